"""Weight decay, decoupled from the gradient or coupled to it, and the masks that say which parameters decay."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import Mask, Path, PyTree, ScalarOrSchedule
from adamjax._core.value import StaticTree, static_field, value
from adamjax._transforms.base import Leafwise
from adamjax._transforms.leafwise import LeafOp, LeafTransform
from adamjax._transforms.learning_rate import signed_factor
from adamjax._transforms.schedule import Scheduled, number_or_schedule


@dataclass(frozen=True)
class DecayLeaves(LeafTransform):
    """Add the parameter times a factor to each leaf that decays."""

    factor: Callable[[np.dtype], Any]  # from a dtype, the factor in it
    decays: Sequence[bool | None] | None  # for each leaf whether it decays; None for all
    cautious: bool = False  # whether a number decays only if that agrees with its update
    state: PyTree = ()  # the transformation's state after the step

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        if self.decays is not None and self.decays[index] is False:
            return ()
        dtype = trees.compute_dtype(dtype, trees.dtype_of(p))
        return (LeafOp(add_agreeing_param if self.cautious else add_scaled_param, self.factor(dtype), dtype),)


def add_scaled_param(u: Array, p: Array, state: Any, factor: Array) -> tuple[Array, Any]:
    """A `LeafFunction`: the update plus the factor times the parameter."""
    return u.astype(factor.dtype) + factor * p.astype(factor.dtype), state


def add_agreeing_param(u: Array, p: Array, state: Any, factor: Array) -> tuple[Array, Any]:
    """A `LeafFunction`: like `add_scaled_param`, but only where that does not oppose the update."""
    u, decay = u.astype(factor.dtype), factor * p.astype(factor.dtype)
    return u + agreeing(decay, u), state


def agreeing(decay: Array, u: Array) -> Array:
    """Return the decay where it does not oppose the update, and 0 elsewhere; of complex numbers, part by part."""
    if jnp.iscomplexobj(decay) or jnp.iscomplexobj(u):
        return jax.lax.complex(agreeing(decay.real, u.real), agreeing(decay.imag, u.imag))
    # No product, which could underflow.
    opposes = ((u > 0) & (decay < 0)) | ((u < 0) & (decay > 0))
    return jnp.where(opposes, jnp.zeros_like(decay), decay)


ADDS_PARAM = (add_scaled_param, add_agreeing_param)


def decay_leaves(
    updates: Leaves,
    params: Leaves | None,
    weight_decay: Any,
    mask: Any,
    sign: int,
    *,
    cautious: bool = False,
    state: PyTree = (),
) -> DecayLeaves:
    """Plan the decay of each leaf that the mask lets decay."""
    decays = None if mask is None or params is None else updates.column(mask_tree(mask, params.tree))
    return DecayLeaves(signed_factor("weight_decay", weight_decay, sign, updates), decays, cautious, state)


@value
class AddDecayedWeights(Scheduled):
    """See `add_decayed_weights`; `flip_sign` subtracts, for after the learning rate."""

    weight_decay: ScalarOrSchedule
    mask: Mask = static_field(default=None)
    flip_sign: bool = static_field(default=False)
    cautious: bool = static_field(default=False)

    def __post_init__(self) -> None:
        self._replace_field("weight_decay", number_or_schedule("weight_decay", self.weight_decay, low=-math.inf))
        self._replace_field("mask", as_mask(self.mask))
        checks.choice("cautious", self.cautious, (False, True))

    @property
    def _schedule(self) -> ScalarOrSchedule:
        return self.weight_decay

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        checks.params_given(params, updates, type(self).__name__)
        weight_decay, state = self._current_value(state)
        sign = -1 if self.flip_sign else 1
        decay = decay_leaves(updates, params, weight_decay, self.mask, sign, cautious=self.cautious, state=state)
        return [decay]


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0, mask: Mask = None, *, cautious: bool = False
) -> AddDecayedWeights:
    """Add `weight_decay * params` to the updates.

    After Adam and before the learning rate, this is decoupled weight decay (Loshchilov & Hutter,
    2019); before Adam it would be L2 regularisation.

    Args:
      weight_decay: A number or a schedule of the step count. This building block takes a negative
        one too (it drives the parameters away from 0); the optimizers refuse it.
      mask: The leaves that decay: a tree of True and False with the structure of the parameters (or a
        prefix of it), or a function that makes one of them. None for all.
      cautious: If True, a number decays only where that does not oppose its update: where the update would take it
        away from 0, the decay leaves it alone. Of complex numbers, that is said of each part.

    Returns:
      A transformation that needs `params`; its state counts the steps where `weight_decay` is a
      schedule.

    Raises:
      ValueError, TypeError: `weight_decay` is not such a number, the mask holds something else, or `cautious` is not
        a bool; at the first update, if the mask does not fit the parameters, or those are missing.

    References:
      Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101; Chen et al., 2025, Cautious Weight Decay, Algorithm
      1, https://arxiv.org/abs/2510.12402.

    >>> import adamjax, jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[10.0]]), "bias": jnp.array([10.0])}
    >>> opt = adamjax.add_decayed_weights(0.5, mask={"kernel": True, "bias": False})
    >>> opt.update({"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}, opt.init(params), params)[0]
    {'bias': Array([1.], dtype=float32), 'kernel': Array([[6.]], dtype=float32)}
    """
    return AddDecayedWeights(weight_decay, mask, cautious=cautious)


class NegateLeaves(LeafTransform):
    """Change the sign of each leaf."""

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        return (LeafOp(negate, None, dtype),)


def negate(u: Array, p: Any, state: Any, operands: None) -> tuple[Array, Any]:
    """A `LeafFunction`: the update with the other sign."""
    return -u, state


@value
class CoupledDecay(Leafwise):
    """`inner`, given the gradient of the objective that torch.optim's coupled options describe.

    The objective is f(params) + weight_decay / 2 * |params|^2, or, to maximize f, the same with -f. The
    state is `inner`'s, whose count a schedule of the weight decay follows.
    """

    inner: Leafwise
    weight_decay: ScalarOrSchedule
    mask: Mask = static_field(default=None)
    maximize: bool = static_field(default=False)

    def __post_init__(self) -> None:
        self._replace_field("weight_decay", number_or_schedule("weight_decay", self.weight_decay))
        self._replace_field("mask", as_mask(self.mask))
        checks.choice("maximize", self.maximize, (False, True))

    def _init(self, params: PyTree) -> PyTree:
        return self.inner._init(params)

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        before: list[LeafTransform] = [NegateLeaves()] if self.maximize else []
        # optax.inject_hyperparams makes arrays of all numbers: a 0 among them needs no parameters.
        if not (params is None and _is_known_zero(self.weight_decay)):
            checks.params_given(params, updates, "coupled weight decay")
            weight_decay: Any = self.weight_decay
            if callable(weight_decay):
                checks.has_count(state, "coupled weight decay")
                weight_decay = weight_decay(state.count)
            before.append(decay_leaves(updates, params, weight_decay, self.mask, 1))
        return [*before, *self.inner._leaf_transforms(updates, state, params)]


def with_coupled_decay(moments: Leafwise, weight_decay: ScalarOrSchedule, mask: Mask, maximize: bool) -> Leafwise:
    """`moments` with coupled options; `moments` itself where they say nothing."""
    coupled = CoupledDecay(moments, weight_decay, mask, maximize)
    plain = isinstance(coupled.weight_decay, float) and coupled.weight_decay == 0 and not maximize
    return moments if plain else coupled


class TreeMask(StaticTree):
    """A mask given as a tree of True and False, as a hashable value."""

    def __init__(self, tree: PyTree) -> None:
        checks.mask(tree)
        super().__init__(jax.tree.map(bool, tree))

    def __call__(self, params: PyTree) -> PyTree:
        return self.tree


def as_mask(mask: Mask) -> Callable[[PyTree], PyTree] | None:
    """Check the argument `mask`; a tree becomes a function that returns it."""
    # A model that is a pytree may be callable too: what it holds decides whether it is a tree.
    if mask is None or isinstance(mask, TreeMask) or (callable(mask) and all(map(callable, jax.tree.leaves(mask)))):
        return mask
    return TreeMask(mask)


def mask_tree(mask: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """Return the bools that a mask stands for, one for each parameter."""
    tree = mask(params)
    checks.mask(tree)
    checks.prefix(tree, params)
    return jax.tree.map(bool, jax.tree.broadcast(tree, params))


# Last names in the path of an array, and names of the modules that have a norm's weight, as equinox calls it.
_BIASES_AND_SCALES = re.compile(r"(^|_)(bias(_\w+)?|offset|scale|beta|gamma)$", re.IGNORECASE)
_NORMS = re.compile(r"norm|(^|_)(ln|bn|gn)(_|\d|$)", re.IGNORECASE)


def decay_mask(params: PyTree, *, exclude: str | None = None) -> PyTree:
    """Find the parameters that weight decay is for: matrices and embeddings, but no biases and no norms.

    The function is a mask itself: `adamw(1e-3, weight_decay=0.1, mask=adamjax.decay_mask)`. It serves inside `groups`,
    and for optimizers of optax, too.

    An array with fewer than two axes does not decay. A bias or a scale can have more: one axis for the layers that are
    stacked in it, or for the heads. So its name counts as well, in the words of Flax (linen and nnx), Equinox and
    Haiku: "bias", "scale", "offset", "beta" or "gamma", alone or after an underscore; "weight" in a module whose name
    has "norm", "ln", "bn" or "gn"; "b" beside a "w".

    Args:
      params: The parameters, or `jax.ShapeDtypeStruct`s.
      exclude: A regular expression: arrays in whose path it is found do not decay either, such as "embed". As a mask,
        ``lambda params: adamjax.decay_mask(params, exclude="embed")``.

    Returns:
      A tree like `params`: True for those that decay.

    Raises:
      ValueError: `exclude` is not a regular expression.

    >>> import adamjax, jax.numpy as jnp
    >>> layer = {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    >>> adamjax.decay_mask(layer)
    {'dense': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    try:
        excluded = None if exclude is None else re.compile(exclude)
    except (re.error, TypeError) as error:
        raise ValueError(f"Invalid exclude value: {exclude!r} is not a regular expression: {error}") from None
    paths = {_name_of(key) for key, _ in jax.tree.leaves_with_path(params)}

    def decays(key: Path, p: Any) -> bool:
        path = _name_of(key)
        if np.ndim(p) < 2 or (excluded is not None and excluded.search(path)):
            return False
        *owners, name = path.split("/")
        owner = next((x for x in reversed(owners) if not x.isdigit()), "")
        is_norm = name == "weight" and _NORMS.search(owner)
        is_bias_of_haiku = name == "b" and "/".join([*owners, "w"]) in paths
        return not (is_norm or is_bias_of_haiku or _BIASES_AND_SCALES.search(name))

    return jax.tree.map_with_path(decays, params)


def _name_of(key: Path) -> str:
    """The path of an array, without the last key in a variable of nnx."""
    return trees.path_of(key).removesuffix("/value")


def _is_known_zero(x: object) -> bool:
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        x = x.item() if x.ndim == 0 else x
    return isinstance(x, (int, float)) and x == 0
