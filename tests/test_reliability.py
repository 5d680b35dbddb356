"""Whatever is thrown at it: random trees and arguments, a million steps, threads, counts at their end, wrong calls.

The fuzz draws 120 cases; ADAMJAX_FUZZ says how many else. All 10 000 take three to four minutes:

    ADAMJAX_FUZZ=10000 pytest tests/test_reliability.py -k any_case
"""

import inspect
import itertools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import CALLS, METHODS
from helpers import assert_equal, assert_same_types, decoded
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from specs import FORMATS, LR, PUBLIC, ROUNDED, SPECS, STORED
from tolerances import LONG_RUN

import adamjax
from adamjax import interop, schedules

pytestmark = pytest.mark.numbers

EXAMPLES = int(os.environ.get("ADAMJAX_FUZZ", "120"))
PACKAGE = Path(adamjax.__file__).parent
PUBLIC_CALLS = calls.public()


@pytest.fixture(scope="module", autouse=True)
def whole_tracebacks():
    """Without JAX's own frames, an error that JAX raised would look like one of ours."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def assert_named(error, *names):
    """It is a ValueError or a TypeError (or ImportError) of this package, and its message has one of the names."""
    assert type(error) in (ValueError, TypeError, ImportError), repr(error)
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    raised_in = Path(traceback.tb_frame.f_code.co_filename)
    assert raised_in.is_relative_to(PACKAGE), f"{raised_in} raised {error!r}"
    assert any(name in str(error) for name in names), f"{error!r} names none of {names}"


OPTIMIZERS = {
    "adam": adamjax.adam,
    "adamw": adamjax.adamw,
    "amsgrad": adamjax.amsgrad,
    "nadam": adamjax.nadam,
    "nadamw": adamjax.nadamw,
    "radam": adamjax.radam,
    "adamax": adamjax.adamax,
    "adamaxw": adamjax.adamaxw,
    "schedule_free_adamw": adamjax.schedule_free_adamw,
    "ademamix": adamjax.ademamix,
    "simplified_ademamix": adamjax.simplified_ademamix,
    "adopt": adamjax.adopt,
    "adam_atan2": adamjax.adam_atan2,
    "stable_adamw": adamjax.stable_adamw,
    "torch's adam": interop.torch.adam,
    "torch's adamw": interop.torch.adamw,
    "torch's nadam": interop.torch.nadam,
    "torch's radam": interop.torch.radam,
    "torch's adamax": interop.torch.adamax,
}

WRAPPERS = ROUNDED | {
    "clipped": lambda opt: adamjax.chain(adamjax.clip_by_global_norm(1.0), opt),
    "group": lambda opt: adamjax.groups({}, default=opt),
}

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = [None, "fast", 1j, [0.1], jnp.array(True), jax.ShapeDtypeStruct((), jnp.bool_)]
NEGATIVE = [*NO_NUMBERS, True, -1.0, NAN, INF, np.float32(-1), np.array([0.1, NAN]), np.array([0.1, 0.2])]
RATES = [1e-3, 0, 1, np.float64(0.1), jnp.float32(0.1), schedules.cosine(0.1, 10)]
NO_FLAGS: list[Any] = [None, "yes", 1, 0.0, {}]
NO_DTYPES = ["int8", "float8_e4m3fn", "tiny", 8, bool, object(), "key<fry>", {}]

# What each hyperparameter may be, what it may not, and what a message calls it.
HYPERPARAMETERS: dict[str, tuple[list[Any], list[Any], str]] = {
    "learning_rate": (RATES, NEGATIVE, "learning rate"),
    "lr": (RATES, NEGATIVE, "learning rate"),
    "b1": ([0, 0.5, np.float32(0.9), jnp.float32(0.9)], [*NEGATIVE, 1, 1.5], "beta parameter at index 0"),
    "b2": ([0.0, 0.5, 0.999999], [*NEGATIVE, 1.0, 2], "beta parameter at index 1"),
    "b3": ([0.0, 0.9999, schedules.half_life(0.9, 0.9999, 10)], [*NEGATIVE, 1.0, 2], "b3"),
    "alpha": ([0, 5.0, schedules.linear(0, 5, 10)], NEGATIVE, "alpha"),
    "a": ([0, 1.27], NEGATIVE, "a"),
    "b": ([0, 1.0], NEGATIVE, "b"),
    "use_clipping": ([True, False], NO_FLAGS, "use_clipping"),
    "cautious": ([True, False], NO_FLAGS, "cautious"),
    "axis_name": ([None], [1, ("a", 1)], "axis_name"),
    "betas": ([(0.9, 0.99), [0, 0.5]], [None, 0.9, (0.9,), (0.9, 1.0), ("a", 0.9), (0.9, None)], "beta"),
    "eps": ([0, 1e-8, 1.0], NEGATIVE, "epsilon"),
    "eps_root": ([0, 1e-8], NEGATIVE, "eps_root"),
    "threshold": ([4, 5.0], [*NEGATIVE, 3], "threshold"),
    "momentum_decay": ([0, 4e-3], NEGATIVE, "momentum_decay"),
    "weight_decay": ([0, 0.1, schedules.linear(0.1, 0, 5)], NEGATIVE, "weight_decay"),
    "warmup_steps": ([None, 0, 5, np.int32(3)], [x for x in NEGATIVE if x is not None], "warmup_steps"),
    "weight_lr_power": ([0, 2.0], NEGATIVE, "weight_lr_power"),
    "mask": ([None, True, lambda p: True], [0, "all", {"a": 1.0}, [None, 2], lambda p: 3], "mask"),
    "nesterov": ([False, True], NO_FLAGS, "nesterov"),
    "maximize": ([False, True], NO_FLAGS, "maximize"),
    "decoupled_weight_decay": ([False, True], [], "decoupled_weight_decay"),
    "variant": (["torch", "corrected", "paper"], [None, True, "tf"], "variant"),
    "cautious_decay": ([True, False], NO_FLAGS, "cautious"),
    "decay_schedule": (["lr", "independent"], [None, True, "both"], "decay_schedule"),
    "mu_dtype": ([mu for mu, _ in FORMATS.values()], [*NO_DTYPES, "float64"], "mu_dtype"),
    "mu_slow_dtype": ([mu for mu, _ in FORMATS.values()], [*NO_DTYPES, "float64"], "mu_slow_dtype"),
    "nu_dtype": ([nu for _, nu in FORMATS.values()], [*NO_DTYPES, "complex64", "float64"], "nu_dtype"),
}
WRONG_LEAVES = [
    jax.ShapeDtypeStruct((2,), jnp.int32),
    jax.ShapeDtypeStruct((), jnp.bool_),
    jax.eval_shape(jax.random.key, 0),
    np.arange(2),
    np.array(["a"]),
    np.array([None]),
    3,
    True,
    "relu",
    math.cos,
    object(),
]


class Leaf(NamedTuple):
    """A floating point or complex array to be."""

    shape: tuple[int, ...]
    dtype: str

    def make(self):
        # Only NumPy has it where JAX is told to use 32 bits.
        if self.dtype == "float64":
            return np.zeros(self.shape)
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


def is_leaf(x):
    return x is None or isinstance(x, Leaf) or any(x is wrong for wrong in WRONG_LEAVES)


def map_leaves(f, spec):
    return jax.tree.map(f, spec, is_leaf=is_leaf)


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple) | st.just((2, 8))
REAL = ["float32", "bfloat16", "float16", "float64"]
LEAVES = st.builds(Leaf, SHAPES, st.sampled_from([*REAL, "complex64"]))


def trees(leaves):
    def nodes(below):
        lists = st.lists(below, max_size=3)
        return lists | lists.map(tuple) | st.dictionaries(st.sampled_from("abc"), below, max_size=3)

    # A None in place of the whole tree would say that there are no parameters.
    return st.recursive(leaves, nodes, max_leaves=4).filter(lambda tree: tree is not None)


def rarely(draw, times=8):
    return draw(st.integers(1, times)) == times


def draw_gradient(draw, p):
    """What comes as the gradient of a leaf: what should, but for some."""
    if rarely(draw):
        return draw(st.sampled_from([None, *WRONG_LEAVES]) | LEAVES)
    if not isinstance(p, Leaf):
        return p
    if not rarely(draw):
        return p._replace(dtype=draw(st.sampled_from(REAL + ["complex64"] * (p.dtype == "complex64"))))
    # To which NumPy would broadcast, or which it would broadcast.
    return p._replace(shape=draw(st.sampled_from([(), (1,), (1, *p.shape), p.shape[1:], (*p.shape, 1)])))


def draw_structure(draw, tree):
    """The tree with a branch wrapped, left out or put in."""
    if isinstance(tree, dict) and tree and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(tree)))
        return tree | {key: draw_structure(draw, tree[key])}
    if isinstance(tree, dict):
        fewer = dict(list(tree.items())[1:])
        return draw(st.sampled_from([tree | {"d": Leaf((), "float32")}, fewer, list(tree.values())]))
    if is_leaf(tree):
        return draw(st.sampled_from([[tree], {"a": tree}, {}]))
    return draw(st.sampled_from([[*tree, None], tree[1:], list(tree), tuple(tree), {"a": tree}]))


def fits(p, g):
    """Whether `g` may be the gradient of `p`."""
    if g is None:
        return True
    if is_leaf(p) or is_leaf(g):
        if not (isinstance(p, Leaf) and isinstance(g, Leaf)):
            return False
        return p.shape == g.shape and (g.dtype != "complex64" or p.dtype == "complex64")
    if type(p) is not type(g) or len(p) != len(g):
        return False
    return all(k in g and fits(p[k], g[k]) for k in p) if isinstance(p, dict) else all(map(fits, p, g))


class Case(NamedTuple):
    optimizer: str
    options: dict[str, Any]
    bad: str | None  # the one of the options that is none
    wrapper: str | None
    with_params: bool
    params: Any
    grads: Any

    @property
    def is_wrong(self):
        """Whether it is to be refused; None where that depends."""
        leaves, grads = (
            [x for x in jax.tree.leaves(tree, is_leaf=is_leaf) if x is not None] for tree in (self.params, self.grads)
        )
        if not all(isinstance(x, Leaf) for x in leaves) or not fits(self.params, self.grads):
            return True
        if (self.wrapper or "").startswith("low_bits") and any(x.dtype == "float16" for x in leaves):
            return True
        mu_dtype = self.options.get("mu_dtype")
        if mu_dtype in (jnp.bfloat16, jnp.float16) and any(x.dtype == "complex64" for x in leaves):
            # A real moment does for a real gradient, if no weight decay makes it complex.
            return True if any(x.dtype == "complex64" for x in grads) else None
        if self.bad is not None:
            # Some show only where there is something to step, or weights that decay.
            return True if grads and self.bad != "mask" else None
        return False if self.with_params or not grads else None


@st.composite
def cases(draw):
    name = draw(st.sampled_from(sorted(OPTIMIZERS)))
    takes = [n for n in inspect.signature(OPTIMIZERS[name]).parameters if n in HYPERPARAMETERS]
    options = {n: draw(st.sampled_from(HYPERPARAMETERS[n][0])) for n in takes if rarely(draw, 3)}
    if name == "schedule_free_adamw" and options.get("b1") == 0:
        del options["b1"]  # which other optimizers may have
    bad = None
    if rarely(draw):
        bad = draw(st.sampled_from([n for n in takes if HYPERPARAMETERS[n][1]]))
        options[bad] = draw(st.sampled_from(HYPERPARAMETERS[bad][1]))
    params = draw(trees(LEAVES | st.sampled_from(WRONG_LEAVES) if rarely(draw) else LEAVES | st.none()))
    grads = map_leaves(lambda p: draw_gradient(draw, p), params)
    if rarely(draw):
        grads = draw_structure(draw, grads)
    wrapper = draw(st.sampled_from([None, None, *WRAPPERS]))
    return Case(name, options, bad, wrapper, not rarely(draw), params, grads)


def trace(f, *trees):
    """`jax.eval_shape` of `f`, which sees tracers for what are shapes, and all else as it is."""
    leaves, structure = jax.tree.flatten(trees)
    shapes = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}

    def call(tracers):
        return f(*jax.tree.unflatten(structure, [tracers.get(i, x) for i, x in enumerate(leaves)]))

    return jax.eval_shape(call, shapes)


def types_of(tree, wide=False):
    """The types of the arrays that JAX makes of the leaves; `wide`, of half precision ones float32."""

    def of_leaf(x):
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.ShapeDtypeStruct(x.shape, jnp.promote_types(dtype, jnp.float32) if wide else dtype)

    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(of_leaf, tree)


def check_types(case):
    """Trace a step: what comes out has the types that it should."""
    opt = OPTIMIZERS[case.optimizer](**case.options)
    opt = opt if case.wrapper is None else WRAPPERS[case.wrapper](opt)
    params, grads = (map_leaves(lambda x: x.make() if isinstance(x, Leaf) else x, t) for t in (case.params, case.grads))
    state = trace(opt.init, params)
    if not any(isinstance(x, np.ndarray) for x in jax.tree.leaves(params)):
        assert_same_types(opt.init(params), state)

    def step(grads, state, params):
        updates, new_state = opt.update(grads, state, params)
        return updates, new_state, None if params is None else adamjax.apply_updates(params, updates)

    updates, new_state, new_params = trace(step, grads, state, params if case.with_params else None)
    assert_same_types(new_state, state)
    expected = types_of(params if case.with_params else grads, wide=case.wrapper in ROUNDED)
    if not case.with_params:  # real gradients of complex parameters have complex updates
        real = not any(x.dtype == "complex64" for x in jax.tree.leaves(params))
        kinds = jax.tree.map(lambda u: real or u.dtype != "complex64", updates)
        expected = jax.tree.map(lambda e, same: e if same else e.update(dtype=jnp.complex64), expected, kinds)
    assert_same_types(updates, expected)
    if case.with_params:
        assert_same_types(new_params, types_of(params))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(case=cases())
def test_any_case(case):
    """Every case is stepped with the right types, or refused by name: nothing is broadcast, cast or raised by JAX."""
    if case.is_wrong is False:
        check_types(case)
        return
    names = ["params", "gradient", "state", "mask", "mu_dtype", "low_bits"]
    if case.bad is not None:
        names = [*names, case.bad, HYPERPARAMETERS[case.bad][2]]
    try:
        check_types(case)
    except AssertionError:
        raise
    except Exception as error:
        assert_named(error, *names)
    else:
        assert case.is_wrong is None


def params_of(name):
    dtype = "bfloat16" if name in ROUNDED else "float32"
    return {"a": jnp.ones((2, 8), dtype), "b": jnp.ones(8, dtype)}


KINDS = {name: spec.make for name, spec in (SPECS | STORED).items()} | {
    "groups": lambda: adamjax.groups({"a": adamjax.adam(LR), "b": adamjax.adamw(LR)}),
    "groups that overlap": lambda: adamjax.groups(
        {"a": {"learning_rate": adamjax.scale(0.5)}, "a|b": {"weight_decay": 0.0}}, default=adamjax.adamw(LR)
    ),
    "plateau": lambda: adamjax.chain(adamjax.adam(LR), schedules.reduce_on_plateau()),
}
# Where states are read in another way, or have other parts.
KINDS_OF_STATE = (
    *("adam coupled schedule", "adamw schedules", "amsgrad torch", "adamaxw", *STORED),
    *("groups", "groups that overlap", "plateau"),
)


def states_that_do_not_fit(name, state):
    """Other states, and this one with one of its arrays replaced by what JAX might take for it."""
    params = params_of(name)
    yield from (None, (), [], {}, "state", params, adamjax.kahan(adamjax.chain()).init(params))
    for other in ({"a": params["b"], "b": params["b"]}, {"a": [params["a"]], "b": params["b"]}):
        yield KINDS[name]().init(other)
    leaves, structure = jax.tree.flatten(state)
    for i, x in enumerate(leaves):
        for wrong in (x[None], "x", jnp.zeros(x.shape, "uint16" if x.dtype == bool else bool)):
            yield jax.tree.unflatten(structure, [*leaves[:i], wrong, *leaves[i + 1 :]])


@pytest.mark.parametrize("name", KINDS_OF_STATE)
def test_states_that_do_not_fit(name):
    opt, params = KINDS[name](), params_of(name)
    for wrong in states_that_do_not_fit(name, opt.init(params)):
        with pytest.raises((ValueError, TypeError)) as caught:
            trace(lambda g, s, p: opt.update(g, s, p, value=1.0), params, wrong, params)
        assert_named(caught.value, "state")


MILLION, POINTS = 1_000_000, 100
LONG_RATE, LONG_DECAY = 1e-4, 1.0
# (wrapper, dtype of the parameters, of the moments); in bfloat16, rounding to nearest would lose every step.
LONG_RUNS = {
    "float32": (adamjax.chain, "float32", (None, None)),
    "bfloat16": (adamjax.chain, "float32", FORMATS["bfloat16"]),
    "int8": (adamjax.chain, "float32", FORMATS["int8"]),
    "kahan": (adamjax.kahan, "bfloat16", (None, None)),
    "low_bits": (ROUNDED["low_bits"], "bfloat16", (None, None)),
    "low_bits=8": (ROUNDED["low_bits=8"], "bfloat16", (None, None)),
    "stochastic bfloat16": (adamjax.stochastic_rounding, "bfloat16", FORMATS["bfloat16"]),
}


@pytest.fixture(scope="module")
def long_run():
    """Gradients of two scales that point uphill on average; and in double, at some points, m, v and p."""
    noise = np.random.default_rng(0).normal(1.0, 1.0, (MILLION, 2, 4))
    grads = (noise * [[1e-4], [1e3]]).astype(np.float32)

    def mean(x, b):
        return lfilter([1 - b], [1, -b], x, axis=0)

    g, t = grads.astype(np.float64), np.arange(1, MILLION + 1)[:, None, None]
    m, v = mean(g, 0.9), mean(g**2, 0.999)
    direction = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    keep = 1 - LONG_RATE * LONG_DECAY
    p = keep**t - LONG_RATE * lfilter([1], [1, -keep], direction, axis=0)
    points = slice(MILLION // POINTS - 1, None, MILLION // POINTS)
    return grads, *(x[points].copy() for x in (m, v, p))


def is_adam(x):
    return isinstance(x, adamjax.AdamState)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_RUNS)
def test_a_million_steps(name, long_run):
    """Nothing wears out: moments and parameters stay near those in double, whatever they are stored in."""
    wrap, dtype, (mu_dtype, nu_dtype) = LONG_RUNS[name]
    grads, m, v, p = long_run
    opt = wrap(adamjax.adamw(LONG_RATE, weight_decay=LONG_DECAY, mu_dtype=mu_dtype, nu_dtype=nu_dtype))

    def step(carry, g):
        return opt.step(g, carry[1], carry[0]), None

    def to_the_next_point(carry, grads):
        carry, _ = jax.lax.scan(step, carry, grads)
        return carry, carry

    params = jnp.ones((2, 4), dtype)
    start = params, opt.init(params)
    by_point = jnp.asarray(grads.reshape(POINTS, -1, 2, 4))
    last, (params, state) = jax.jit(lambda *a: jax.lax.scan(to_the_next_point, *a))(start, by_point)
    assert_same_types(last, start)
    adam = next(filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam)))
    adam = decoded(adam)
    errors = {"mu": (adam.mu - m) / np.sqrt(v), "nu": adam.nu / v - 1, "params": np.asarray(params, np.float64) - p}
    for part, error in errors.items():
        tolerance = LONG_RUN[name][part]
        assert np.max(np.abs(error)) <= tolerance.worst
        assert abs(np.mean(error)) <= tolerance.bias


LARGEST = 2**31 - 1
OF_TORCH = ("adam", "adamw", "radam", "adamax")
WITHOUT_END = {name: KINDS[name] for name in (*PUBLIC, "adamw schedules", "adamw independent", *STORED)}
WITHOUT_END |= {f"torch's {name}": lambda name=name: getattr(interop.torch, name)(LR) for name in OF_TORCH}


def with_largest_counts(state):
    def of_leaf(path, x):
        return jnp.full_like(x, LARGEST) if getattr(path[-1], "name", "") == "count" else x

    return jax.tree.map_with_path(of_leaf, state)


def test_learning_goes_on_when_the_count_has_ended():
    """After 2**31 - 1 steps the count stays, and the parameters go on downhill."""

    @jax.jit
    def learn(carries):
        def step(carries, _):
            return {name: opts[name].step(p, s, p) for name, (p, s) in carries.items()}, None

        return jax.lax.scan(step, carries, length=5)[0]

    # The mean of 2**31 - 1 norms that skip_spikes would compare with is none.
    opts = {name: make() for name, make in WITHOUT_END.items() if name != "skip_spikes"}
    params = {name: params_of(name)["b"] for name in opts}
    start = {name: (params[name], with_largest_counts(opt.init(params[name]))) for name, opt in opts.items()}
    found = learn(start)
    assert_same_types(found, start)
    for name, (p, state) in found.items():
        assert_equal(with_largest_counts(state), state)
        assert all(np.all(np.isfinite(np.asarray(x, np.float64))) for x in jax.tree.leaves(state)), name
        assert all(np.all(np.isfinite(x) & (x < 1)) for x in jax.tree.leaves(p)), name


SCHEDULES = [name for name, x in PUBLIC_CALLS.items() if inspect.isclass(x) and issubclass(x, schedules.Schedule)]


@pytest.mark.parametrize("name", sorted({*SCHEDULES} - {"schedules.Schedule", "schedules.FromFunction"}))
def test_schedules_have_a_value_at_the_end_of_the_count(name):
    schedule = PUBLIC_CALLS[name](**CALLS[name].arguments)
    found = schedule(jnp.int32(LARGEST))
    assert 0 <= found <= schedule.peak
    assert_equal(found, schedule(jnp.int32(LARGEST - 1)))


def test_threads_share_an_optimizer():
    """Eight threads, each with parameters of its own, get what they get one after another."""
    opt, together = adamjax.kahan(adamjax.adamw(schedules.cosine(0.1, 30), mu_dtype=jnp.bfloat16)), threading.Barrier(8)
    step = jax.jit(opt.step)

    def train(seed, wait=lambda: None):
        # Some of the same shapes, so that threads trace and compile the same at once, and others.
        p = params_of("kahan")["b"][seed % 2 :] + seed
        wait()
        state = opt.init(p)
        for _ in range(30):
            p, state = step(p, state, p)
        return p, state

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda seed: train(seed, together.wait), range(8)))
    for seed in range(8):
        assert_equal(found[seed], train(seed))


ROWS = {name: (PUBLIC_CALLS[name], call) for name, call in CALLS.items()} | METHODS

# What messages call an argument, where that is not its name.
WORDS = {
    "learning_rate": "learning rate",
    "lr": "learning rate",
    "b1": "beta parameter at index 0",
    "b2": "beta parameter at index 1",
    "eps": "epsilon",
    "transforms": "chain",
    "ranges": "space",
    "x": "schedule",
    "inner": "opt",
    "name": "format",
    "params": "parameters",
    "updates": "gradient",
    "grads": "gradient",
}


def test_every_public_name_is_known_here():
    assert sorted(PUBLIC_CALLS) == sorted([*CALLS, *calls.HELD, *calls.BASES, *calls.INNER, *calls.FILES])


def error_of(function, arguments):
    """What calling it raises, if anything; of what is not installed, nothing can be said."""
    positional, keywords = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional = arguments[name] if isinstance(arguments[name], tuple) else (arguments[name],)
        elif parameter.kind is parameter.VAR_KEYWORD:
            given = arguments.get(name, {})
            keywords |= given if isinstance(given, dict) else {name: given}
        elif name in arguments:
            keywords[name] = arguments[name]
    try:
        function(*positional, **keywords)
    except ImportError:
        pytest.skip("what this needs is not installed")
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", ROWS)
def test_wrong_calls_are_refused_by_name(name):
    """Arguments left out, None in place of each, two of them swapped: what is not right says what is wrong."""
    function, (right, optional, cheap) = ROWS[name]
    parameters = inspect.signature(function).parameters
    whole = {n: p.default for n, p in parameters.items() if p.default is not p.empty} | right
    if cheap:
        assert error_of(function, right) is None
    for n, p in parameters.items():
        named = p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if named and p.default is p.empty:
            error = error_of(function, {k: x for k, x in right.items() if k != n})
            assert isinstance(error, TypeError)
            assert n in str(error)
        if n in whole and (cheap or n not in optional):
            error = error_of(function, right | {n: None})
            if n in optional:
                assert error is None
            else:
                assert_named(error, n, WORDS.get(n, n))
    in_order = [n for n in whole if parameters[n].kind is not inspect.Parameter.KEYWORD_ONLY]
    for a, b in itertools.combinations(in_order, 2):
        error = error_of(function, right | {a: whole[b], b: whole[a]})
        if error is not None:  # two numbers may well be those that are meant
            assert_named(error, *(WORDS.get(n, n) for n in (a, b)), a, b, "params", "gradient", "state")
