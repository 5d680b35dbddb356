"""Statistics of one step: of its gradients, updates, moments and parameters."""

import operator
from collections import namedtuple
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamjax._core import checks, collectives, low_precision, trees
from adamjax._core.numerics import abs_sq
from adamjax._core.quantization import is_moment, sharded_like
from adamjax._core.typing import AxisName, GradientTransformation, Path, PyTree
from adamjax._core.value import Value, static_field, value
from adamjax._transforms import moment_storage
from adamjax._transforms.adam import scale_by_adam
from adamjax._transforms.ademamix import scale_by_ademamix
from adamjax._transforms.groups import Groups
from adamjax._transforms.moment_storage import Moment
from adamjax._transforms.moments import find_moments
from adamjax._transforms.rates import learning_rate_of

_SAMPLE = 1024  # elements per parameter for the quantiles
_QUANTILES = (0.05, 0.5, 0.95)


class LeafStats(NamedTuple):
    """Figures of one parameter, of all together, or of each in turn: float32 arrays.

    Fields:
      size: The number of elements.
      gradient_norm, update_norm, parameter_norm: Euclidean norms.
      update_ratio: The root mean square of the update divided by that of the parameter; infinite if the parameter is 0.
      rate_low, rate_median, rate_high: The 5th, 50th and 95th percentiles of the effective learning rate,
        |update| / |bias-corrected first moment|, over up to 1024 elements. The update includes weight decay.
        For all parameters together: the means of their percentiles, weighted by size. The first moment of AdEMAMix
        is the sum of both means, the slow one times its weight.
      eps_dominated: The fraction of elements with eps larger than the root of the second moment, among
        those whose gradient and second moment are not 0.
      lost: The fraction of updates that rounding to the parameter's dtype discards, among those not 0.
      zero_gradients, nonfinite_gradients: Fractions of the elements.
      storage_error: The root mean square change of the next direction due to storing the moments in fewer
        bits, relative to the direction; estimated from the spacing of the stored numbers.
      signal_to_noise: The root mean square of the first moment divided by that of the root of the second
        one, both bias-corrected: 1 for the same gradients at each step; 0.23 for pure noise, with b1 = 0.9.
      cosine: The cosine of the angle between update and gradient: -1 is straight downhill.
      b2, eps: Hyperparameters that the figures depend on.
    """

    size: Array | np.ndarray
    gradient_norm: Array | np.ndarray
    update_norm: Array | np.ndarray
    parameter_norm: Array | np.ndarray
    update_ratio: Array | np.ndarray
    rate_low: Array | np.ndarray
    rate_median: Array | np.ndarray
    rate_high: Array | np.ndarray
    eps_dominated: Array | np.ndarray
    lost: Array | np.ndarray
    zero_gradients: Array | np.ndarray
    nonfinite_gradients: Array | np.ndarray
    storage_error: Array | np.ndarray
    signal_to_noise: Array | np.ndarray
    cosine: Array | np.ndarray
    b2: Array | np.ndarray
    eps: Array | np.ndarray


@value
class AdamStats(Value):
    """The result of `measure`; `stats["layer_0/kernel"]` has the figures of one parameter.

    Fields:
      count: int32 scalar, the number of steps done, including this one.
      overall: The figures of all parameters together, scalars. `b2` and `eps` are the largest.
      leaves: The figures of each parameter, float32[number of parameters], in the order of `paths`.
      learning_rate: That of the next step, as `learning_rate_of` returns it: a scalar, or a dict of them by group. None
        if `opt` was not given, is not that of the whole state, or has none that can be seen.
      paths, shapes, dtypes: Those of the parameters.
    """

    count: Array
    overall: LeafStats
    leaves: LeafStats
    learning_rate: Any
    paths: tuple[str, ...] = static_field()
    shapes: tuple[tuple[int, ...], ...] = static_field()
    dtypes: tuple[str, ...] = static_field()

    def __getitem__(self, path: str) -> LeafStats:
        if path not in self.paths:
            raise KeyError(f"no parameter {path!r}; there are {', '.join(self.paths)}")
        return LeafStats(*(x[self.paths.index(path)] for x in self.leaves))

    def __repr__(self) -> str:
        return f"AdamStats({len(self.paths)} parameters)"


def check_stats(x: object) -> AdamStats:
    if not isinstance(x, AdamStats):
        raise TypeError(f"Invalid stats value: {x!r}; stats must be what adamjax.diagnostics.measure returned")
    return x


# Sums over the elements of one parameter. `gradient`, `update`, `parameter`, and all from `signal` on are of squares,
# `product` is of gradient times update, and the others count elements.
_Sums = namedtuple(
    "_Sums",
    "size gradient update parameter product zero nonfinite moved lost driven dominated signal noise direction error",
)


def measure(
    grads: PyTree,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    opt: GradientTransformation | None = None,
    axis_name: AxisName = None,
) -> AdamStats:
    """Measure one step of an optimizer of the Adam family.

    This is a pure function, for use inside or outside `jax.jit`. It costs one more pass over its arguments.

    Args:
      grads: The gradients given to `update`; unscaled by `unscale` if the loss was scaled.
      updates: The updates that `update` returned for them.
      state: The state that `update` returned. Moments are found anywhere in it, also those of optax.
      params: The parameters before the step.
      opt: The optimizer, for its b1, b2, eps, form of AMSGrad and learning rate. None, or one of another library: those
        of `adam()`, and no learning rate.
      axis_name: The mapped axis (or axes) over which the arguments are sharded, inside `jax.shard_map` or
        `jax.pmap`. The quantiles are then means of the shards' quantiles.

    Returns:
      Figures of each parameter that has a gradient, and of all together.

    Raises:
      ValueError, TypeError: The trees do not fit each other, or the state has no moments, or is not one of `opt`.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.adam(1e-3)
    >>> params = {"w": jnp.full(4, 2.0)}
    >>> grads = {"w": jnp.array([0.0, 1e-9, 1e-9, 1e-2])}
    >>> updates, state = opt.update(grads, opt.init(params), params)
    >>> stats = adamjax.diagnostics.measure(grads, updates, state, params, opt=opt)
    >>> print(f"{stats['w'].eps_dominated:.2f} {stats['w'].zero_gradients:.2f} {stats['w'].rate_high:.0f}")
    0.67 0.25 90909
    """
    for name, tree in (("grads", grads), ("updates", updates), ("params", params)):
        if tree is None:
            raise ValueError(f"{name} is None: measure takes the trees of one step")
    checks.parameters(params)
    leaves, _ = checks.updates(grads, params)
    checks.updates(updates, params)
    collectives.check_axis_name(axis_name)
    rows = zip(leaves.paths(), leaves.leaves, leaves.column(updates), leaves.column(params), strict=True)
    chosen = [row for row in rows if row[1] is not None]
    if not chosen:
        raise ValueError("there are no gradients to measure: all of them are None, or the tree is empty")
    moments = _moments_by_path(state, opt, params, {key: np.shape(g) for key, g, *_ in chosen})
    sums, rates, hyper = [], [], []
    for key, g, u, p in chosen:
        found = moments[key]
        total, quantiles = _leaf(g, u, p, found)
        axes = collectives.axes_varying(total, axis_name)
        sums.append(jax.lax.psum(total, axes) if axes else total)
        rates.append(jax.lax.pmean(quantiles, axes) if axes else quantiles)
        numbers = [checks.as_scalar(name, getattr(found.member, name), np.dtype(np.float32)) for name in ("b2", "eps")]
        hyper.append(jnp.stack(numbers))
    table, rate_table, hyper_table = jnp.stack(sums, 1), jnp.stack(rates, 1), jnp.stack(hyper, 1)
    mean_rates = jnp.sum(rate_table * table[:1], axis=1) / jnp.sum(table[0])
    return AdamStats(
        jnp.max(jnp.stack([moments[key].count for key, *_ in chosen])),
        _figures(_Sums(*jnp.sum(table, axis=1)), mean_rates, jnp.max(hyper_table, axis=1)),
        _figures(_Sums(*table), rate_table, hyper_table),
        _learning_rate(opt, state),
        tuple(trees.path_of(key) for key, *_ in chosen),
        tuple(np.shape(p) for *_, p in chosen),
        tuple(trees.dtype_of(p).name for *_, p in chosen),
    )


def _learning_rate(opt: GradientTransformation | None, state: PyTree) -> Any:
    """The learning rate, if `opt` and the state say it. Moments are found in the states of others around `opt`, too."""
    try:
        return None if opt is None else learning_rate_of(opt, state)
    except (TypeError, ValueError):
        return None


class _Moments(NamedTuple):
    """The moments of one parameter in a state."""

    count: Array  # type: ignore[assignment]  # hides tuple.count
    m: Moment
    v: Moment
    v_max: Moment | None
    slow: Moment | None
    member: Any  # the part of the optimizer that has the hyperparameters


def _moments_by_path(
    state: PyTree, opt: GradientTransformation | None, params: PyTree, needed: dict[Path, tuple[int, ...]]
) -> dict[Path, _Moments]:
    """Find the moments of the parameters by path; raise if some of the `needed` shapes are missing."""
    keys = [key for key, _ in jax.tree.leaves_with_path(params)]
    nodes = find_moments(state)
    if not nodes:
        raise ValueError(
            "there are no moments in the state: measure takes what init or update of Adam returned, and "
            "schedule-free optimizers keep no first moment"
        )
    found: dict[Path, _Moments] = {}
    for (where, node), member in zip(nodes, _members(opt, params, nodes), strict=True):
        others = node.nu, getattr(node, "nu_max", None), getattr(node, "mu_slow", None)
        structure: Any
        with_paths, structure = jax.tree.flatten_with_path(node.mu, is_leaf=is_moment)
        columns = [[None] * len(with_paths) if x is None else structure.flatten_up_to(x) for x in others]
        for (key, m), v, v_max, slow in zip(with_paths, *columns, strict=True):
            if m is not None:
                # The state has trees of moments, or a tree like params with a state for each parameter.
                owner = key if key in keys else max((k for k in keys if where[-len(k) :] == k), key=len, default=None)
                if owner is not None:
                    found[owner] = _Moments(node.count, m, v, v_max, slow, member)
    for key, shape in needed.items():
        name = f"params{jax.tree_util.keystr(key)}"
        if key not in found:
            raise ValueError(
                f"the state has no moments of {name}: it belongs to other parameters, or another optimizer "
                "(of a parameter that Adam does not train, the gradient should be None)"
            )
        if found[key].m.shape not in (shape, (*shape, 2)):
            raise ValueError(
                f"the moments of {name} have shape {found[key].m.shape}, expected {shape}: "
                "this state belongs to other parameters"
            )
    return found


def _expanded(opt: PyTree, params: PyTree) -> PyTree:
    """Return `opt` with the members that `params` need in place of each `Groups`, in the order of its state."""

    def members(x: Any) -> Any:
        if not isinstance(x, Groups):
            return x
        return [_expanded(*pair) for pair in zip(x.members_for(params), x.split_params(params), strict=True)]

    return jax.tree.map(members, opt, is_leaf=lambda x: isinstance(x, Groups))


def _members(opt: GradientTransformation | None, params: PyTree, nodes: list[tuple[Path, Any]]) -> list[Any]:
    """Return the part of `opt` that each node of the state belongs to."""

    def has_betas(x: object) -> bool:
        return all(hasattr(x, name) for name in ("b1", "b2", "eps"))

    members = [x for x in jax.tree.leaves(_expanded(opt, params), is_leaf=has_betas) if has_betas(x)]
    if not members:
        return [
            scale_by_ademamix()
            if hasattr(node, "mu_slow")
            else scale_by_adam(amsgrad=getattr(node, "nu_max", None) is not None)
            for _, node in nodes
        ]
    if len(members) == 1:
        return members * len(nodes)
    if len(members) != len(nodes):
        raise ValueError(
            f"{opt!r} has {len(members)} members with b1, b2 and eps, and the state has moments at {len(nodes)} "
            "places: this is not its state, or it cannot be told which belong to which"
        )
    return members


def _leaf(g: Array, u: Array, p: Array, found: _Moments) -> tuple[Array, Array]:
    """Return the sums over the elements of a parameter, and the quantiles of its effective learning rates."""
    m, v = found.m, found.v
    g, u, p = map(jnp.asarray, (g, u, p))
    if jnp.iscomplexobj(p) and m.shape != np.shape(p):  # torch stores real and imaginary parts
        g, u, p = (jnp.stack([x.real, x.imag], axis=-1) for x in (g, u, p))
    dtype = trees.compute_dtype(*map(trees.dtype_of, (g, u, p)), m.dtype)
    real = trees.real_dtype(dtype)
    stepped = p.astype(dtype) + u.astype(dtype)
    if low_precision.is_low_precision(p.dtype):
        stepped = low_precision.round_to_nearest(stepped, p.dtype)
    lost = (u != 0) & (stepped == p.astype(dtype))
    g, u, p = g.astype(dtype), u.astype(dtype), p.astype(dtype)
    v_loaded = moment_storage.load(v, real, g)
    v_max = None if found.v_max is None else moment_storage.load(found.v_max, real, g)
    t = jnp.maximum(found.count, 1).astype(real)
    slow = None if found.slow is None else moment_storage.load_first(found.slow, v_loaded, dtype, g)
    m_loaded = moment_storage.load_first(m, v_loaded, dtype, g)
    parts = found.member.parts(m_loaded, v_loaded, v_max if slow is None else slow, t)
    alive = parts.root > 0
    scale = jnp.where(alive, 1 / jnp.where(alive, parts.root + parts.eps, 1), 0)  # no second moment, no direction
    driven = alive & sharded_like(g != 0, alive)  # of an element that has no gradient any more, eps is not the reason
    direction = abs_sq(parts.m_hat) * scale * scale
    error = jnp.zeros_like(scale)
    m_noise, v_noise = moment_storage.storage_noise(m, v, v_loaded)
    if m_noise is not None:
        third = v_max if slow is None else jnp.zeros_like(slow)
        error += abs_sq(found.member.parts(m_noise.astype(dtype), v_loaded, third, t).m_hat) * scale * scale
    if found.slow is not None:
        slow_noise, _ = moment_storage.storage_noise(found.slow, v, v_loaded)
        if slow_noise is not None:
            of_slow = found.member.parts(jnp.zeros_like(m_loaded), v_loaded, slow_noise.astype(dtype), t)
            error += abs_sq(of_slow.m_hat) * scale * scale
    if v_noise is not None:
        error += direction * (v_noise.astype(real) / jnp.where(v_loaded > 0, v_loaded, 1)) ** 2 / 4
    terms = _Sums(
        size=jnp.ones_like(scale),
        gradient=abs_sq(g),
        update=abs_sq(u),
        parameter=abs_sq(p),
        product=g.real * u.real + g.imag * u.imag if jnp.iscomplexobj(g) else g * u,
        zero=g == 0,
        nonfinite=~jnp.isfinite(g),
        moved=u != 0,
        lost=lost,
        driven=driven,
        dominated=driven & (parts.root < parts.eps),
        signal=abs_sq(parts.m_hat),
        noise=parts.root**2,
        direction=direction,
        error=error,
    )
    sums = _summed([x.astype(real) for x in terms])
    update, m_hat = jnp.abs(_some(u)), jnp.abs(_some(parts.m_hat))
    rates = jnp.where(m_hat > 0, update / jnp.where(m_hat > 0, m_hat, 1), np.inf)
    return sums.astype(np.float32), _quantiles(rates.astype(np.float32))


def _quantiles(x: Array) -> Array:
    """Return the quantiles of the finite elements, or 0 if there are none."""
    count = jnp.sum(jnp.isfinite(x).astype(np.float32))
    ranks = jnp.round(np.asarray(_QUANTILES, np.float32) * jnp.maximum(count - 1, 0)).astype(np.int32)
    return jnp.where(count > 0, jnp.sort(x)[ranks], 0)


def _summed(terms: list[Array]) -> Array:
    if terms[0].ndim > 1:
        # Reduce all terms at once. One at a time, XLA would read the arrays for each, or store the terms.
        zeros = [np.zeros((), x.dtype) for x in terms]
        terms = jax.lax.reduce(terms, zeros, lambda a, b: list(map(operator.add, a, b)), [terms[0].ndim - 1])
    return jnp.stack([jnp.sum(x) for x in terms])


def _some(x: Array) -> Array:
    """Sample up to 1024 elements, evenly spread."""
    if not x.ndim:
        return x[None]
    if x.size <= _SAMPLE:
        positions = np.arange(x.size)
    else:  # a Weyl sequence, more even than random numbers
        positions = (np.arange(_SAMPLE) * (5**0.5 - 1) / 2 % 1 * x.size).astype(int)
    index = tuple(np.unravel_index(positions, x.shape))
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        return x.at[index].get(out_sharding=NamedSharding(mesh, PartitionSpec()))
    return x[index]


def _figures(s: _Sums, rates: Array, hyper: Array) -> LeafStats:
    def over(x: Array, total: Array) -> Array:
        return jnp.where(x == 0, 0, x / jnp.where(x == 0, 1, total))

    return LeafStats(
        size=s.size,
        gradient_norm=jnp.sqrt(s.gradient),
        update_norm=jnp.sqrt(s.update),
        parameter_norm=jnp.sqrt(s.parameter),
        update_ratio=jnp.sqrt(over(s.update, s.parameter)),
        rate_low=rates[0],
        rate_median=rates[1],
        rate_high=rates[2],
        eps_dominated=over(s.dominated, s.driven),
        lost=over(s.lost, s.moved),
        zero_gradients=over(s.zero, s.size),
        nonfinite_gradients=over(s.nonfinite, s.size),
        storage_error=jnp.sqrt(over(s.error, s.direction)),
        signal_to_noise=jnp.sqrt(over(s.signal, s.noise)),
        cosine=over(s.product, jnp.sqrt(s.gradient) * jnp.sqrt(s.update)),
        b2=hyper[0],
        eps=hyper[1],
    )
