"""Optimizers, parameters and gradients for random programs, and what the oracle says of a step of them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from hypothesis import strategies as st
from tolerances import ADVERSARY

import adamjax
from adamjax.rounding import RoundingState
from adamjax.safety import SkipState

LARGEST = 1e17  # larger gradients are limited, which the oracle knows nothing of
FLOAT16_MOMENTS = 1.0  # the scale of gradients that float16 moments hold

EPS32 = 2.0**-23
SHAPES = ((), (0,), (1,), (3,), (2, 20))
# A place for a leaf is a §.
CONTAINERS = {
    1: ("§", "{'a': §, 'b': None, 'c': {}}", "[[], (§,)]"),
    2: ("{'a': §, 'b': §}", "Pair(§, {'a': §, 'c': None})", "Model([§], (None, §))"),
    3: ("[§, (§, None), OrderedDict(b=§)]", "{'a': {'b': §}, 'c': Pair(§, [§])}"),
}
DTYPES = (("float32",), ("bfloat16",), ("float16",), ("float32", "bfloat16"), ("complex64", "float32"))
SCALES = (1e-30, -1e-12, 1e-4, -0.3, 1e4, -1e4, 1e15, -1e38)


class Wrapper(NamedTuple):
    source: str  # with a § for the optimizer
    rounds: str | None = None
    clips: bool = False
    skips: bool = False
    groups: bool = False
    packs: bool = False


WRAPPERS = (
    Wrapper("§"),
    Wrapper("adamjax.packed(§)", packs=True),
    Wrapper("adamjax.packed(§, below=3)", packs=True),
    Wrapper("adamjax.kahan(§)", "kahan"),
    Wrapper("adamjax.stochastic_rounding(§, seed=3)", "stochastic"),
    Wrapper("adamjax.master_weights(§)", "master"),
    Wrapper("adamjax.master_weights(§, low_bits=True)", "low_bits"),
    Wrapper("adamjax.master_weights(§, low_bits=8)", "low_bits=8"),
    Wrapper("adamjax.skip_nonfinite(§)", skips=True),
    Wrapper("adamjax.skip_nonfinite(adamjax.kahan(adamjax.packed(§)))", "kahan", skips=True, packs=True),
    Wrapper("adamjax.chain(adamjax.clip_by_global_norm(1.0), §)", clips=True),
    Wrapper("adamjax.master_weights(adamjax.chain(adamjax.clip_by_global_norm(1.0), §))", "master", clips=True),
    Wrapper("adamjax.groups({'^a$': {'learning_rate': 0.03}}, default=§)", groups=True),
    Wrapper(
        "adamjax.kahan(adamjax.packed(adamjax.groups({'^a$': {'learning_rate': 0.03}}, default=§)))",
        "kahan",
        groups=True,
        packs=True,
    ),
)

# The call, its further arguments, and what the oracle calls them.
OURS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("adam", "", {}),
    ("adam", "weight_decay=0.1", {"coupled": 0.1}),
    ("adam", "nesterov=True, maximize=True", {"nesterov": True, "maximize": True}),
    ("adam", "amsgrad='paper'", {"amsgrad": "paper"}),
    ("adamw", "weight_decay=0.1", {"decoupled": 0.1}),
    (
        "adamw",
        "weight_decay=0.1, amsgrad='corrected', maximize=True",
        {"decoupled": 0.1, "amsgrad": "corrected", "maximize": True},
    ),
    ("amsgrad", "", {"amsgrad": "torch"}),
    ("nadam", "", {"nesterov": True}),
    ("nadamw", "weight_decay=0.1", {"nesterov": True, "decoupled": 0.1}),
    ("radam", "", {"algorithm": "radam"}),
    ("radam", "nesterov=True", {"algorithm": "radam", "nesterov": True}),
    ("adamax", "", {"algorithm": "adamax"}),
    ("adamaxw", "weight_decay=0.1", {"algorithm": "adamax", "decoupled": 0.1}),
)
TORCHS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("adam", "weight_decay=0.1, maximize=True", {"coupled": 0.1, "maximize": True}),
    ("adamw", "weight_decay=0.1, amsgrad=True", {"decoupled": 0.1, "amsgrad": "torch"}),
    ("nadam", "", {"algorithm": "nadam of torch"}),
    ("nadam", "weight_decay=0.1, decoupled_weight_decay=True", {"algorithm": "nadam of torch", "decoupled": 0.1}),
    ("radam", "", {"algorithm": "radam of torch"}),
    ("adamax", "weight_decay=0.1", {"algorithm": "adamax", "coupled": 0.1}),
)
OPTIMIZERS = [("adamjax", *x) for x in OURS] + [("interop.torch", *x) for x in TORCHS]
FORMATS = {
    None: "None",
    "bfloat16": "jnp.bfloat16",
    "float16": "jnp.float16",
    "int8": "adamjax.quantized('int8', block_size=8, min_size=1)",
    "int4": "adamjax.quantized('int4', block_size=8, min_size=1)",
}
CODES = ("int8", "int4")
PAIRS = [(None, None)] * 4 + [(a, b) for a in FORMATS for b in FORMATS if b != "float16"]


class Spec(NamedTuple):
    """An optimizer, as a source with a § for the learning rate, and what the oracle has to know of it."""

    source: str
    rule: dict[str, Any]  # the arguments of `oracle.direction`
    decays: dict[str, Any]  # coupled, decoupled, maximize
    wrapper: Wrapper
    formats: tuple[str | None, str | None]
    scheduled: bool
    of_torch: bool
    name: str

    @property
    def quantized(self) -> bool:
        """Whether one of the moments is to be stored as codes."""
        return bool({*self.formats} & {*CODES})


@st.composite
def specs(draw, optimizer, dtypes, groups):
    """An optimizer for parameters of these dtypes; `groups` says whether there are an "a" and others at the top."""
    module, name, arguments, words = optimizer
    of_torch = module != "adamjax"
    wrapper = draw(st.sampled_from([w for w in WRAPPERS if (groups or not w.groups) and not (of_torch and w.packs)]))
    if "low_bits" in wrapper.source and "float16" in dtypes:
        wrapper = WRAPPERS[5]
    b1, b2, eps = (
        draw(st.sampled_from((0.9, 0.9, 0.5, 0.0))),
        draw(st.sampled_from((0.999, 0.9))),
        draw(st.sampled_from((1e-8, 1e-3))),
    )
    mu, nu = (None, None) if of_torch else draw(st.sampled_from(PAIRS))
    if "complex64" in dtypes and mu is not None:
        mu = None  # first moments are complex
    scheduled = draw(st.booleans())
    rate = "adamjax.schedules.cosine(§, 20)" if scheduled else "§"
    numbers = f"betas=({b1}, {b2}), eps={eps}" if of_torch else f"{b1}, {b2}, {eps}"
    formats = f"mu_dtype={FORMATS[mu]}, nu_dtype={FORMATS[nu]}" if mu or nu else ""
    more = ", ".join(x for x in (rate, numbers, arguments, formats) if x)
    call = f"{module}.{name}({more})"
    outside = ("coupled", "decoupled", "maximize")
    return Spec(
        wrapper.source.replace("§", call),
        {"b1": b1, "b2": b2, "eps": eps} | {k: x for k, x in words.items() if k not in outside},
        {k: x for k, x in words.items() if k in outside},
        wrapper,
        (mu, nu),
        scheduled,
        of_torch,
        name,
    )


def fill(container: str, leaves: Sequence[str]) -> str:
    for leaf in leaves:
        container = container.replace("§", leaf, 1)
    return container


def limit(spec: Spec, kind: str, scale: float, dtype: str) -> float:
    """A scale whose gradients are representable, and that moments can hold."""
    if "float16" in spec.formats:
        return math.copysign(FLOAT16_MOMENTS, scale)
    factor = {"spread": 1e5, "spike": 1e6}.get(kind, 10.0)
    return math.copysign(min(abs(scale), (1e4 if dtype == "float16" else LARGEST) / factor), scale)


def long_leaf(x: Any, of_torch: bool) -> Any:
    """An array in long double; torch's optimizers see a complex one as pairs."""
    x = oracle.long(np.asarray(x).astype(np.float32) if x.dtype == jnp.bfloat16 else np.asarray(x))
    return np.stack([x.real, x.imag], axis=-1) if of_torch and np.iscomplexobj(x) else x


def saves(format: str, shape: tuple[int, ...]) -> bool:
    """Whether an array has a last axis of 4 numbers or more, and is not empty; else it stays in float32."""
    return bool(shape) and 0 not in shape and shape[-1] >= 4


class Expected(NamedTuple):
    change: Any  # of the parameter
    tolerance: Any
    bound: Any  # of the change, whatever the format
    size: Any  # of the change, if no two gradients had cancelled


class LeafOracle:
    """One parameter: its moments in long double, and how far stored ones may be off."""

    def __init__(self, spec: Spec, p: Any, learning_rate: float | None = None):
        self.spec, self.own_rate = spec, learning_rate
        self.formats = [None if x in CODES and not saves(x, np.shape(p)) else x for x in spec.formats]
        start = long_leaf(p, spec.of_torch)
        self.memory, self.sizes = oracle.start(start), oracle.start(start)
        self.error_m = self.error_v = self.error_max = 0.0
        self.largest = 0.0
        self.kinds: set[Any] = set()  # of the gradients so far

    @property
    def quantized(self) -> bool:
        """Whether one of the moments is stored as codes."""
        return bool({*self.formats} & {*CODES})

    @property
    def even(self) -> bool:
        """Whether the gradients were all of one size."""
        return len(self.kinds) == 1 and None not in self.kinds

    def freeze(self) -> None:
        """A step without gradient: only ours count it."""
        if not self.spec.of_torch:
            self.memory, self.sizes = (x._replace(t=x.t + 1) for x in (self.memory, self.sizes))

    def advance(self, p: Any, g: Any, rate: float, kind: Any) -> Expected:
        """One step from the parameter `p` (long) with the gradient `g` (long)."""
        spec, decays = self.spec, self.spec.decays
        rate = self.own_rate or rate
        self.kinds.add(kind)
        g = (-g if decays.get("maximize") else g) + oracle.LONG(decays.get("coupled", 0.0)) * p
        found, self.memory = oracle.direction(self.memory, g, **spec.rule)
        sizes, self.sizes = oracle.direction(self.sizes, np.abs(g), **spec.rule)
        self.largest = max(self.largest, float(np.max(np.abs(g), initial=0.0)))
        decay = rate * oracle.LONG(decays.get("decoupled", 0.0)) * p
        relative = ADVERSARY["float32"]
        error = relative * sizes + self._storage_error(found, sizes)
        bound = np.full(np.shape(g), self._bound(sizes))
        tolerance = rate * error + 4 * EPS32 * np.abs(decay)
        return Expected(-rate * found - decay, tolerance, rate * bound + np.abs(decay), rate * sizes)

    def _storage_error(self, found: Any, sizes: Any) -> Any:
        """How far the direction may be off, where moments are rounded to half precision before they are used."""
        rounding = {"bfloat16": (2.0**-7, 2.0**-126), "float16": (2.0**-10, 2.0**-24)}
        (mu, mu_least), (nu, nu_least) = (rounding.get(x or "", (0.0, 0.0)) for x in self.formats)
        rule, memory = self.spec.rule, self.memory
        last, self.error_m = self.error_m, rule["b1"] * self.error_m
        self.error_m = self.error_m + mu * (np.abs(memory.m) + self.error_m) + mu_least
        self.error_v = rule["b2"] * self.error_v
        self.error_v = self.error_v + nu * (memory.v + self.error_v) + nu_least
        v, error = memory.v, self.error_v
        if rule.get("amsgrad"):
            self.error_max = np.maximum(self.error_max, self.error_v) + nu * memory.v_max
            v, error = memory.v_max, self.error_max / (1 - rule["b2"] if rule["amsgrad"] == "corrected" else 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(v > error, v / (v - error), np.inf if nu else 1.0)
            root = ratio if rule.get("algorithm") == "adamax" else np.sqrt(ratio)
            per_m = np.where(self.sizes.m > 0, sizes / np.where(self.sizes.m > 0, self.sizes.m, 1), 0)
            of_m = np.where((self.error_m + last) * per_m > 0, (self.error_m + last) * per_m * root, 0.0)
            return np.where(found != 0, np.abs(found) * (root - 1), 0.0) + of_m

    def _bound(self, sizes: Any) -> Any:
        """The largest direction, in theory (Cauchy and Schwarz), times what a format may add to it."""
        rule, t = self.spec.rule, self.memory.t
        if rule.get("algorithm", "adam").startswith("radam"):
            # Its direction may be the first moment itself.
            return ADVERSARY["codes"] * max(self.largest, 10.0) if self.quantized else np.inf
        b1, b2 = oracle.LONG(rule["b1"]), oracle.LONG(rule["b2"])
        ages = np.arange(t)
        weights = (1 - b1) * b1**ages / (1 - b1**t)
        if rule.get("nesterov"):
            weights = (1 - b1) * b1 ** (ages + 1) / (1 - b1 ** (t + 1)) + (ages == 0) * (1 - b1) / (1 - b1**t)
        if rule.get("algorithm") == "adamax":
            bound = np.sum(weights / b2**ages)
        elif rule.get("algorithm") == "nadam of torch":
            return np.inf
        else:
            bound = np.sqrt(np.sum(weights**2 / ((1 - b2) * b2**ages)) * (1 - b2**t))
        if rule.get("amsgrad") == "paper":  # no bias corrections
            bound = bound * (1 - b1**t) / np.sqrt(1 - b2**t)
        return ADVERSARY["codes" if self.quantized else "bound of halves" if any(self.formats) else "bound"] * bound


def rounding_state(state: Any) -> Any:
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, RoundingState))
    return next((x for x in found if isinstance(x, RoundingState)), None)


def skip_state(state: Any) -> Any:
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SkipState))
    return next((x for x in found if isinstance(x, SkipState)), None)


def wide_params(spec: Spec, params: Any, state: Any) -> Any:
    """The parameters as the wrapper knows them, leaf by leaf in long double; and the relative error of that."""
    structure: Any
    leaves, structure = jax.tree.flatten(params)
    own = [0.0 if x.dtype in (jnp.float32, jnp.complex64) else float(jnp.finfo(x.dtype).eps) for x in leaves]
    wide = [long_leaf(x, spec.of_torch) for x in leaves]
    kept = rounding_state(state)
    if kept is None or spec.wrapper.rounds == "stochastic":
        return wide, [x or EPS32 for x in own]
    residuals = structure.flatten_up_to(kept.kept)
    if spec.wrapper.rounds == "kahan":
        pairs = zip(wide, residuals, strict=True)
        found = [w if r is None else w + long_leaf(r, spec.of_torch) for w, r in pairs]
        return found, [2 * x * x or EPS32 for x in own]
    low_bits: Any = {"low_bits": True, "low_bits=8": 8}.get(spec.wrapper.rounds or "", False)
    weights = adamjax.master_weights(adamjax.chain(), low_bits=low_bits).weights(params, kept)
    error = 2.0**-15 if low_bits == 8 else EPS32
    found = [long_leaf(x, spec.of_torch) for x in jax.tree.leaves(weights)]
    return found, [error if x else EPS32 for x in own]


def smallest(dtype: Any) -> float:
    """What rounding to a dtype may add where its numbers lie no closer."""
    return {"float16": 2.0**-24, "bfloat16": 2.0**-126}.get(jnp.dtype(dtype).name, 2.0**-126)
