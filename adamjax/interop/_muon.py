"""Muon for the matrices and Adam for the rest, as one optimizer: optax's directions, in the groups of this package."""

import re
from typing import Any, ClassVar, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from adamjax._core import checks, collectives, trees
from adamjax._core.optional import require
from adamjax._core.trees import Leaves
from adamjax._core.typing import Extra, FusedMode, Mask, PyTree, Scalar, ScalarOrSchedule
from adamjax._core.value import precise_field, static_field, value
from adamjax._transforms.base import Transformation
from adamjax._transforms.chain import chain
from adamjax._transforms.groups import Groups
from adamjax._transforms.learning_rate import ScaleByLearningRate
from adamjax._transforms.moment_storage import MomentFormat
from adamjax._transforms.weight_decay import AddDecayedWeights
from adamjax.optimizers import adamw

# Names of embeddings and heads that no other matrix has.
EMBEDDINGS_AND_HEADS = "(?i)embed|lm_head|logits"
_FLOATS = ("bfloat16", "float16", "float32", "float64")


class MuonState(NamedTuple):
    """State of Muon's matrices.

    Fields:
      count: int32 scalar, the number of steps done.
      mu: The momentum of each matrix, in `momentum_dtype`; without one in the matrix's own dtype, but at least float32.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with
    mu: PyTree


jax.export.register_namedtuple_serialization(MuonState, serialized_name="adamjax.MuonState")


@value
class ScaleByMuon(Transformation):
    """The direction of `optax.contrib.scale_by_muon`, scaled by the shape of each matrix, as a value."""

    beta: Scalar = precise_field()
    eps: Scalar
    consistent_rms: Scalar | None
    momentum_dtype: Any = static_field(default=None)
    ns_steps: int = static_field(default=5)
    nesterov: bool = static_field(default=True)

    def __post_init__(self) -> None:
        self._check_numbers("beta", below=1.0)
        self._check_numbers("eps")
        if self.consistent_rms is not None:
            self._check_numbers("consistent_rms")
        if self.momentum_dtype is not None:
            found = checks.dtype("momentum_dtype", self.momentum_dtype, _FLOATS, "expected a floating point dtype")
            self._replace_field("momentum_dtype", found)
        self._replace_field("ns_steps", checks.count("ns_steps", self.ns_steps))
        checks.choice("nesterov", self.nesterov, (False, True))

    def _transform(self) -> Any:
        optax = require("optax", "optax", "Muon")
        return optax.contrib.scale_by_muon(
            ns_steps=self.ns_steps,
            beta=self.beta,
            eps=self.eps,
            mu_dtype=self.momentum_dtype,
            nesterov=self.nesterov,
            weight_dimension_numbers=_as_matrices,
        )

    def _init(self, params: PyTree) -> MuonState:
        def momentum(p: Any) -> Any:
            dtype = trees.compute_dtype(trees.dtype_of(p)) if self.momentum_dtype is None else self.momentum_dtype
            return trees.zeros_like(p, dtype)

        return MuonState(trees.zero_count(params), jax.tree.map(momentum, params))

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        state = checks.state(state, MuonState, "muon")
        leaves = Leaves.of(updates)
        momenta = checks.moments(leaves, state.mu, "state.mu")
        for path, g in jax.tree.leaves_with_path(updates):
            if axes := collectives.varying_over(jnp.asarray(g)):
                raise ValueError(
                    f"{checks.at('the gradient', path)} differs over the mapped axes {sorted(axes)}, and Muon needs "
                    "the whole matrix: average the gradients, and take sharded arrays under jax.jit, or sharding.zero1"
                )
        grads = leaves.map(lambda g: jnp.asarray(g).astype(trees.compute_dtype(trees.dtype_of(g))))
        stepped = leaves.map(lambda _, m: m, momenta)  # a frozen one rests
        transform = self._transform()
        theirs = require("optax", "optax", "Muon").contrib.MuonState(
            state.count, stepped.tree, transform.init({}).ns_coeffs
        )
        with jax.numpy_dtype_promotion("standard"):
            directions, new = transform.update(grads.tree, theirs)
            directions = jax.tree.map(self._scaled, directions)
        pairs = zip(momenta, leaves.column(new.mu), strict=True)
        mu = [old if x is None else x.astype(old.dtype) for old, x in pairs]
        return directions, MuonState(trees.increment(state.count), leaves.like(mu).tree)

    def _scaled(self, u: Array) -> Array:
        fan_in, fan_out = u.shape[-2:]
        if self.consistent_rms is None:
            return u * max(1.0, fan_out / fan_in) ** 0.5
        return u * (checks.as_scalar("consistent_rms", self.consistent_rms, u.dtype) * max(fan_in, fan_out) ** 0.5)


def _as_matrices(tree: PyTree) -> PyTree:
    """Their last two axes are those of a matrix; others before them number the matrices of a stack."""
    numbers = require("optax", "optax", "Muon").contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda _: numbers, tree)


@value
class MuonAndAdam(Groups):
    """See `muon`: its members are Adam's and Muon's, in this order."""

    adam: str = static_field(default=EMBEDDINGS_AND_HEADS)
    stacked: str | None = static_field(default=None)

    described_as: ClassVar[str] = "MuonAndAdam"

    def _owners(self, params: PyTree) -> list[tuple[str, Any, tuple[int, ...]]]:
        leaves = [(trees.path_of(key), leaf) for key, leaf in jax.tree.leaves_with_path(params)]
        for name in ("adam", "stacked"):
            pattern = getattr(self, name)
            given = pattern is not None and pattern != EMBEDDINGS_AND_HEADS
            if given and leaves and not any(re.search(pattern, path) for path, _ in leaves):
                paths = checks.listed(path for path, _ in leaves)
                raise ValueError(f"Invalid {name} value: {pattern!r} matches no parameter; those are {paths}")
        return [(path, leaf, (int(self._is_matrix(path, np.ndim(leaf))),)) for path, leaf in leaves]

    def _is_matrix(self, path: str, ndim: int) -> bool:
        is_stack = ndim > 2 and self.stacked is not None and re.search(self.stacked, path) is not None
        return (ndim == 2 or is_stack) and re.search(self.adam, path) is None


def muon(
    learning_rate: ScalarOrSchedule = 1e-3,
    *,
    adam: str = EMBEDDINGS_AND_HEADS,
    stacked: str | None = None,
    beta: Scalar = 0.95,
    weight_decay: ScalarOrSchedule = 0.1,
    mask: Mask = None,
    consistent_rms: Scalar | None = 0.2,
    ns_steps: int = 5,
    nesterov: bool = True,
    momentum_dtype: DTypeLike | None = None,
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_weight_decay: ScalarOrSchedule | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    mu_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
    fused: FusedMode = False,
) -> MuonAndAdam:
    """Muon for the matrices, and our `adamw` for embeddings, heads, vectors and all else.

    Muon is `optax.contrib.scale_by_muon`, its arithmetic in float32 or wider. With `consistent_rms`, a step of Muon is
    as long as one of Adam, so that one learning rate and one weight decay fit both, as Liu et al. have them.
    The method `describe(params)` of the result says which parameter goes where.

    Args:
      learning_rate: A number or a schedule, for both.
      adam: A regular expression: matrices in whose path it is found go to Adam. The default finds embeddings and heads
        by usual names; for others, give it.
      stacked: A regular expression for arrays with three axes or more whose last two are those of matrices, such as
        the layers of a scan. None: all such arrays go to Adam.
      beta: In [0, 1), the decay rate of Muon's momentum.
      weight_decay: Decoupled weight decay, for both.
      mask: The leaves that decay; see `adamjax.add_decayed_weights`.
      consistent_rms: The root mean square of Muon's direction for any shape. None: it is as long as Jordan's, which
        needs a higher learning rate, and an `adam_learning_rate`.
      ns_steps: At least 1, the steps of Newton and Schulz's iteration.
      nesterov: Whether Muon's momentum is Nesterov's. (That of `optax.contrib.muon` makes Adam Nesterov's, too.)
      momentum_dtype: A floating point dtype for Muon's momentum.
      adam_learning_rate, adam_weight_decay: Adam's own. None: the same as Muon's.
      b1, b2, eps, mu_dtype, nu_dtype, fused: Of `adamjax.adamw`; Muon shares `eps`.

    Returns:
      A transformation whose state is the pair of Adam's and Muon's. `update` needs `params`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind; at `init`, a pattern finds no parameter;
        in `jax.shard_map`, a device has a part of a matrix.
      ImportError: optax is not installed.

    References:
      Jordan et al., 2024, https://kellerjordan.github.io/posts/muon; Liu et al., 2025,
      https://arxiv.org/abs/2502.16982.

    >>> import jax.numpy as jnp
    >>> opt = muon(1e-3, adam="table")
    >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2), "table": jnp.ones((8, 4))}
    >>> print("\\n".join(row[:23] for row in opt.describe(params).splitlines()))
    parameter  shape  group
    bias       [2]    adam
    kernel     [4,2]  muon
    table      [8,4]  adam
    """
    require("optax", "optax", "Muon")
    _check_pattern("adam", adam)
    if stacked is not None:
        _check_pattern("stacked", stacked)
    matrices = chain(
        ScaleByMuon(beta, eps, consistent_rms, momentum_dtype, ns_steps, nesterov),
        AddDecayedWeights(weight_decay, mask),
        ScaleByLearningRate(learning_rate),
    )
    rest = adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate, b1, b2, eps, 0.0, mu_dtype,
        weight_decay if adam_weight_decay is None else adam_weight_decay, mask, nu_dtype=nu_dtype, fused=fused,
    )  # fmt: skip
    return MuonAndAdam((rest, matrices), ("adam", "muon"), (None, None), adam, stacked)


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"Invalid {name} value: {pattern!r} is not a regular expression: {error}") from None
