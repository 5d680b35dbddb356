"""Convert states of optax's Adam family to adamjax and back, to continue a run."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from adamjax._core import checks, trees
from adamjax._core.optional import require
from adamjax._core.packing import packed_like, unpacked
from adamjax._core.quantization import is_quantized
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._transforms.adam import ScaleByAdam
from adamjax._transforms.adamax import ScaleByAdamax
from adamjax._transforms.ademamix import ScaleByAdEMAMix, ScaleBySimplifiedAdEMAMix
from adamjax._transforms.base import as_transformation
from adamjax._transforms.chain import Chain
from adamjax._transforms.learning_rate import ScaleByLearningRate
from adamjax._transforms.moments import AdamState, AdEMAMixState, Moments, find_moments
from adamjax._transforms.packed import Packed
from adamjax._transforms.schedule import ScheduleState
from adamjax._transforms.schedule_free import ScheduleFreeAdamW, ScheduleFreeState
from adamjax._transforms.weight_decay import AddDecayedWeights
from adamjax.interop import _adam_values
from adamjax.interop._muon import MuonState as MuonState
from adamjax.interop._muon import muon as muon

# For each state of ours, those of optax: their names, which work without optax, and their fields in the order of ours.
_SOURCES: dict[type, dict[str, tuple[str, ...]]] = {
    AdamState: {"ScaleByAdamState": ("count", "mu", "nu"), "ScaleByAmsgradState": ("count", "mu", "nu", "nu_max")},
    AdEMAMixState: {"ScaleByAdemamixState": ("count", "m1", "nu", "m2")},
}
_NAMES = [name for sources in _SOURCES.values() for name in sources]


def import_state(opt: GradientTransformation, params: PyTree, state: PyTree) -> PyTree:
    """Convert the state of a run of optax to one with which `opt` continues it.

    Args:
      opt: `adamjax.adam`, `adamw`, `amsgrad(variant="corrected")` ("paper" if optax does not correct biases), `nadam`,
        `nadamw`, `radam`, `adamax`, `adamaxw`, `adopt`, `ademamix`; alone, in a chain, `optax.MultiSteps` or
        `optax.inject_hyperparams`. Also `schedule_free_adamw`, alone or in a chain of adamjax.
      params: The parameters, or `jax.ShapeDtypeStruct`s.
      state: The state of the same optimizer of optax; alone or in any of these, even if `opt` is not.

    Returns:
      A state like `opt.init(params)`.

    Raises:
      ValueError, TypeError: The two do not fit (the message names the place): `state` has no state of that optimizer,
        or several; only one has `nu_max`; trees or shapes differ; it has numbers that no run leaves;
        `optax.MultiSteps` has gradients, which `opt` cannot hold.
    """
    as_transformation(opt, "argument opt of import_state")
    parts = jax.tree.leaves(opt, is_leaf=lambda x: isinstance(x, ScaleByAdam))
    if any(isinstance(x, ScaleByAdam) and x.amsgrad == "torch" for x in parts):
        raise ValueError(
            "opt keeps the maximum of uncorrected moments, like torch, but optax keeps that of corrected ones: "
            "use variant='corrected'"
        )
    filled = _filled(opt.init(trees.concrete(params)), state, "state")
    _check_values(opt, filled)
    return _with_relative_weights(opt, filled)


def export_state(opt: GradientTransformation, state: PyTree) -> PyTree:
    """Convert a state of `opt` to one with which optax's optimizer of the same name continues the run.

    Args:
      opt: As for `import_state`, alone, and not `schedule_free_adamw`.
      state: The state of `opt`.

    Returns:
      The state of optax's `adam`, `adamw`, `amsgrad` and so on, with the state of a schedule if `opt` has one.

    Raises:
      TypeError: optax has no such optimizer.
      ImportError: optax is not installed.
    """
    optax = require("optax", "optax", "exporting to optax")
    transforms = _transforms(opt)
    checks.member_states(state, len(transforms), "opt")
    exported = []
    for transform, part in zip(transforms, state, strict=True):
        transform = transform.inner if isinstance(transform, Packed) else transform
        if _has_state_in_optax(transform):
            checks.state(part, transform.state_type, type(transform).__name__)
            count, mu, nu, third = map(unpacked, part)
            if any(map(is_quantized, jax.tree.leaves((mu, nu, third), is_leaf=is_quantized))):
                raise TypeError("moments that are quantised cannot be exported: optax has no such storage")
            if isinstance(part, AdEMAMixState):
                exported.append(optax.contrib.ScaleByAdemamixState(count, count, mu, third, nu))
            elif third is None:
                exported.append(optax.ScaleByAdamState(count, mu, nu))
            else:
                exported.append(optax.ScaleByAmsgradState(count, mu, nu, third))
        elif isinstance(transform, (AddDecayedWeights, ScaleByLearningRate)):
            scheduled = isinstance(part, ScheduleState)
            exported.append(optax.ScaleByScheduleState(part.count) if scheduled else optax.EmptyState())
        else:
            raise TypeError(f"optax has nothing like {checks.shown(transform)}")
    for i in _implied_decay(transforms):
        exported.insert(i, optax.EmptyState())
    return tuple(exported)


def wrap(opt: GradientTransformation, *, optax_state: bool = False) -> Any:
    """Convert `opt` to an `optax.GradientTransformationExtraArgs`, a named tuple of two functions.

    Most code needs no conversion: where optax is imported, `opt` is an instance of that class. Convert it for code that
    takes an optimizer apart as a tuple, or that looks into its state for `optax.ScaleByAdamState`.

    Args:
      opt: A transformation.
      optax_state: Keep the state of optax's optimizer of the same name, as `export_state` makes it. `opt` must be one
        that `export_state` takes, and not packed.

    Returns:
      The pair of its `init` and `update`; its hyperparameters are closed over.

    Raises:
      TypeError: `opt` is not a transformation; or optax has no such optimizer (raised here or by `init`).
      ImportError: optax is not installed.

    >>> import adamjax, jax.numpy as jnp
    >>> state = wrap(adamjax.adamw(1e-3), optax_state=True).init(jnp.zeros(3))
    >>> [type(part).__name__ for part in state]
    ['ScaleByAdamState', 'EmptyState', 'EmptyState']
    """
    found = as_transformation(opt, "argument opt of wrap")
    optax = require("optax", "optax", "wrapping for optax")
    checks.choice("optax_state", optax_state, (False, True))
    if not optax_state:
        return optax.GradientTransformationExtraArgs(found.init, found.update)
    transforms = _transforms(found)
    if any(isinstance(t, Packed) for t in transforms):
        raise TypeError(f"{found!r} packs its moments, which optax's state cannot hold: wrap it without packed")
    implied = _implied_decay(transforms)

    def init(params: PyTree) -> PyTree:
        return export_state(found, found.init(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> tuple[PyTree, PyTree]:
        checks.member_states(state, len(transforms) + len(implied), "wrap")
        parts = [_to_ours(part) for i, part in enumerate(state) if i not in implied]
        updates, new = found.update(updates, tuple(parts), params, **extra)
        return updates, export_state(found, new)

    return optax.GradientTransformationExtraArgs(init, update)


def _transforms(opt: object) -> tuple[GradientTransformation, ...]:
    if not isinstance(opt, Chain):
        raise TypeError(f"{opt!r} is not one of adamjax's optimizers, such as adamjax.adamw")
    return opt.transforms


def _implied_decay(transforms: Sequence[GradientTransformation]) -> list[int]:
    """Where optax's chain has a state more than ours: that of its AdEMAMix' weight decay, which may be 0."""
    kinds = [type(t.inner) if isinstance(t, Packed) else type(t) for t in transforms]
    return [] if AddDecayedWeights in kinds else [i + 1 for i, kind in enumerate(kinds) if kind is ScaleByAdEMAMix]


def _has_state_in_optax(transform: GradientTransformation) -> TypeGuard[Moments]:
    # torch's AMSGrad keeps another maximum, and the simplified AdEMAMix of optax a sum of gradients, not their mean.
    is_other = isinstance(transform, ScaleBySimplifiedAdEMAMix) or getattr(transform, "amsgrad", None) == "torch"
    return isinstance(transform, Moments) and not is_other


def _to_ours(part: PyTree) -> PyTree:
    """Convert the state of one member of optax's chain; undoes `export_state`."""
    for ours, sources in _SOURCES.items():
        if type(part).__name__ in sources:
            return ours(*(getattr(part, field) for field in sources[type(part).__name__]))
    return ScheduleState(part.count) if part else ()


def _filled(template: PyTree, theirs: PyTree, where: str) -> PyTree:
    """Fill `template`, a state before the first step, with the contents of optax's state."""
    if type(template) in _SOURCES:
        return _moments(template, theirs, where)
    if isinstance(template, ScheduleFreeState):
        return _schedule_free(template, theirs, where)
    if isinstance(template, ScheduleState):
        (_, found), *_ = _find(theirs, "ScaleByScheduleState") or [_only(theirs, where, "Adam", *_NAMES)]
        return ScheduleState(jnp.asarray(found.count))
    if _is_state(template) and type(template).__name__ == type(theirs).__name__:
        fields = template._fields
        return type(template)(*(_filled(getattr(template, f), getattr(theirs, f), f"{where}.{f}") for f in fields))
    if isinstance(template, tuple) and _find(template, *(kind.__name__ for kind in (*_SOURCES, ScheduleFreeState))):
        return type(template)(_filled(t, theirs, where) for t in template)
    if isinstance(template, dict) and isinstance(theirs, dict) and theirs.keys() < template.keys():
        # Keep the hyperparameters that optax does not have.
        theirs = template | theirs
    expected: Any = jax.tree.structure(template)
    if expected != jax.tree.structure(theirs):
        if not jax.tree.leaves(template):
            return template
        raise ValueError(f"the parts of {where} {checks.difference(theirs, template, where)}")
    return jax.tree.map(lambda like, x: jnp.asarray(x).astype(like.dtype), template, theirs)


def _moments(template: Any, theirs: PyTree, where: str) -> Any:
    """Fill a state of moments, such as an `AdamState`."""
    for path, steps in _find(theirs, "MultiStepsState"):
        if int(steps.mini_step):
            raise ValueError(
                f"{where}{path} has accumulated {int(steps.mini_step)} gradients that this optimizer has no place "
                "for: import between two updates, or into optax.MultiSteps around it"
            )
    sources = _SOURCES[type(template)]
    path, found = _only(theirs, where, type(template).__name__.removesuffix("State"), *sources)
    if isinstance(template, AdamState) and (template.nu_max is None) != (not hasattr(found, "nu_max")):
        raise ValueError(f"{where}{path} is {'with' if hasattr(found, 'nu_max') else 'without'} nu_max, and opt is not")

    def moment(ours: str, name: str) -> PyTree:
        like = getattr(template, ours)
        return packed_like(like, _like(unpacked(like), getattr(found, name), f"{where}{path}.{name}"))

    _, *fields = sources[type(found).__name__]
    count = _count(found.count, f"{where}{path}.count")
    return type(template)(count, *map(moment, template._fields[1:], fields))


def _schedule_free(template: ScheduleFreeState, theirs: PyTree, where: str) -> ScheduleFreeState:
    """Fill the state of `schedule_free_adamw`, but with optax's sum of weights."""
    path, found = _only(theirs, where, "Schedule-Free", "ScheduleFreeState")
    place = f"{where}{path}"
    inner = found.base_optimizer_state
    base, second = _only(inner, f"{place}.base_optimizer_state", "schedule_free_adamw", "ScaleByRmsWithCountState")
    return ScheduleFreeState(
        jnp.maximum(_count(found.step_count, f"{place}.step_count") - 1, 0),  # which begins at 1
        _like(template.z, found.z, f"{place}.z"),
        _like(template.nu, second.nu, f"{place}.base_optimizer_state{base}.nu"),
        *(jnp.asarray(x, template.b1.dtype) for x in (found.b1, found.weight_sum, found.max_lr)),
    )


def _with_relative_weights(opt: Any, state: PyTree) -> PyTree:
    """Divide optax's sums of the weights of Schedule-Free steps by the last weight, as ours are."""
    if not _find(state, "ScheduleFreeState"):
        return state
    members = jax.tree.leaves(opt, is_leaf=lambda x: isinstance(x, ScheduleFreeAdamW))
    powers = [x.weight_lr_power for x in members if isinstance(x, ScheduleFreeAdamW)]
    if len(powers) != 1:
        raise ValueError(
            f"opt has {len(powers) or 'no'} schedule_free_adamw where one is expected, perhaps inside an optimizer of "
            "optax: import the state of schedule_free_adamw alone, and put it into that of opt"
        )

    def relative(x: Any) -> Any:
        if not isinstance(x, ScheduleFreeState):
            return x
        return x._replace(weight_sum=x.weight_sum / jnp.where(x.max_lr > 0, x.max_lr, 1) ** powers[0])

    return jax.tree.map(relative, state, is_leaf=lambda x: isinstance(x, ScheduleFreeState))


def _count(x: Any, where: str) -> jax.Array:
    known = not isinstance(x, jax.Array) or _is_known(x)
    return jnp.asarray(_adam_values.step_count(x, where) if known else x, jnp.int32)


def _check_values(opt: Any, state: PyTree) -> None:
    """Check that a run of Adam can have left the moments of `state`, as far as they are known."""
    members = [x for x in jax.tree.leaves(opt, is_leaf=lambda x: isinstance(x, Moments)) if isinstance(x, Moments)]
    member = members[0] if len(members) == 1 else None
    betas = None if member is None else _adam_values.known_betas((member.b1, member.b2))  # type: ignore[attr-defined]
    for path, found in find_moments(state):
        where = "state" + jax.tree_util.keystr(path)
        arrays = found.mu, found.nu, getattr(found, "nu_max", None)
        names = f"{where}.mu", f"{where}.nu", f"{where}.nu_max"
        _check_arrays(arrays, names, betas, is_norm=isinstance(member, ScaleByAdamax))
        if isinstance(found, AdEMAMixState):
            _check_arrays((found.mu_slow, found.nu, None), (f"{where}.mu_slow", f"{where}.nu", ""))
    for place, found in _find(state, "ScheduleFreeState", where="state"):
        _check_arrays((found.z, found.nu, None), (f"{place}.z", f"{place}.nu", ""))


def _check_arrays(
    moments: tuple[PyTree, PyTree, PyTree | None],
    names: tuple[str, str, str],
    betas: tuple[float, float] | None = None,
    is_norm: bool = False,
) -> None:
    first, second, maximum = moments
    maxima = [None] * len(jax.tree.leaves(second)) if maximum is None else jax.tree.leaves(maximum)
    for (key, m), v, v_max in zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), maxima, strict=True):
        if all(x is None or _is_known(x) for x in (m, v, v_max)):
            last = None if v_max is None else _adam_values.plain_array(v_max, names[2])
            arrays = _adam_values.plain_array(m, names[0]), _adam_values.plain_array(v, names[1]), last
            _adam_values.check_moments(*arrays, names, jax.tree_util.keystr(key), betas, is_norm=is_norm)


def _is_known(x: Any) -> bool:
    """Return whether the numbers of an array can be read here: it is not traced, and all of it is on this machine."""
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_fully_addressable


def _like(template: PyTree, x: PyTree, where: str) -> PyTree:
    expected: Any = jax.tree.structure(template)
    if expected != jax.tree.structure(x):
        raise ValueError(
            f"the arrays of {where} {checks.difference(x, template, where)}: of other parameters, or opt stores "
            "moments in another format"
        )
    for (path, like), leaf in zip(jax.tree.leaves_with_path(template), jax.tree.leaves(x), strict=True):
        name = where + jax.tree_util.keystr(path)
        if like.shape != jnp.shape(leaf):
            raise ValueError(f"{name} has shape {jnp.shape(leaf)}, expected {like.shape}")
        if not jnp.issubdtype(trees.dtype_of(leaf), jnp.inexact):
            raise ValueError(f"{name} is {trees.dtype_of(leaf)}, and moments are floats: decode them first")
        if trees.compute_dtype(trees.dtype_of(leaf)) != trees.compute_dtype(like.dtype):
            raise ValueError(f"{name} is {leaf.dtype}, and opt keeps {like.dtype}")
    return jax.tree.map(lambda like, leaf: jnp.asarray(leaf).astype(like.dtype), template, x)


def _only(theirs: PyTree, where: str, optimizer: str, *names: str) -> tuple[str, Any]:
    """Return the only state of the types `names`, which are those of an optimizer, with its path."""
    found = _find(theirs, *names)
    if len(found) != 1:
        places = ", ".join(where + path for path, _ in found)
        raise ValueError(
            f"{where} has {len(found) or 'no'} state{'s'[: len(found) != 1]} of {optimizer}{places and ': ' + places}"
        )
    return found[0]


def _find(tree: PyTree, *names: str, where: str = "") -> list[tuple[str, Any]]:
    """Return the states of types `names` in `tree`, with their paths."""
    if _is_state(tree):
        if type(tree).__name__ in names:
            return [(where, tree)]
        children = [(f".{field}", getattr(tree, field)) for field in tree._fields]
    elif isinstance(tree, (tuple, list)):
        children = [(f"[{i}]", child) for i, child in enumerate(tree)]
    elif isinstance(tree, dict):
        children = [(f"[{key!r}]", child) for key, child in tree.items()]
    else:
        return []
    return [match for key, child in children for match in _find(child, *names, where=where + key)]


def _is_state(x: object) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields")
