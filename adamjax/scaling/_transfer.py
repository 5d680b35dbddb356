"""The optimizer of a large model, from that of a small one."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from adamjax._core import checks
from adamjax._core.trees import Leaves
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._core.value import replaced, static_field, value
from adamjax._transforms.base import Result, StepContext, Transformation, Wrapper, as_transformation, run_inside
from adamjax._transforms.chain import Chain
from adamjax._transforms.groups import Groups, groups
from adamjax.scaling import _batch, _hyperparameters, _initial
from adamjax.scaling._growth import Axes, Pair, pairs_of, shapes_of
from adamjax.scaling._rules import DECAYS, OUTPUTS, Factors, Rules, for_run, product


class ParameterScaling(NamedTuple):
    """What `transfer` does for a parameter.

    Fields:
      path: The path in the large model, and that of its counterpart in the small one.
      counterpart: The path of its counterpart in the small model.
      kind: "hidden" (fan-in and fan-out grow), "input" (only fan-out), "output" (only fan-in), "vector" (one axis, such
        as a bias), or "fixed".
      small, large: The shapes in both models.
      fan_in, fan_out, depth: The factors by which they grow.
      factors: The factors of hyperparameters, initial values and outputs.
    """

    path: str
    counterpart: str
    kind: str
    small: tuple[int, ...]
    large: tuple[int, ...]
    fan_in: float
    fan_out: float
    depth: float
    factors: Factors


@value
class Transferred(Wrapper):
    """The optimizer that `transfer` returns, and what the model needs beside it.

    Fields:
      inner: The optimizer, with `groups` of parameters that have factors of their own.
      parameters: A `ParameterScaling` for each parameter.
    """

    has_own_state: ClassVar[bool] = False
    takes_first: ClassVar[bool] = True

    inner: Any
    parameters: tuple[ParameterScaling, ...] = static_field(described=False)

    def __post_init__(self) -> None:
        self._wrap("transfer")

    def _init(self, params: PyTree) -> PyTree:
        return self.inner._init(params)

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        return run_inside(self.inner, updates, state, context)

    def __repr__(self) -> str:
        return f"Transferred({self.inner!r})"

    def describe(self) -> str:
        """A table: how each parameter grows, and the factors of its hyperparameters, initial values and outputs.

        The learning rate, the weight decay and eps are set. The initial values and the forward pass are the model's:
        multiply them by the factors in the last columns.
        """
        names = ["parameter", "shapes", "kind", "fan-in", "fan-out", "depth", *_HEADINGS]
        rows = []
        for x in self.parameters:
            shapes = " -> ".join(f"[{','.join(map(str, shape))}]" for shape in (x.small, x.large))
            rows.append([x.path, shapes, x.kind, *(f"{n:g}" for n in (x.fan_in, x.fan_out, x.depth, *x.factors))])
        widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [names, *rows]]
        return "\n".join([*table, *self._notes()])

    def _notes(self) -> list[str]:
        """What the shapes cannot tell."""
        kinds = {x.kind for x in self.parameters}
        if "input" not in kinds or "output" in kinds:
            return []
        growth = max(x.fan_out for x in self.parameters if x.kind == "input")
        return [
            "No parameter is an output (a fan-in that grows, and a fan-out that does not). If the embedding is the "
            f"last layer as well, take output='multiplier', and multiply the logits by {1 / growth:g}."
        ]

    def check_init(self, small: PyTree, large: PyTree) -> None:
        """Check that initial parameters of both models differ as the rules say.

        The standard deviation of each parameter is compared, within 10 %, or five standard errors if those are more.
        Parameters that are constant, such as biases of 0, must be so in both.

        Args:
          small: Initial parameters of the small model: a tree of arrays.
          large: Those of the large model.

        Raises:
          ValueError: They do not; the message has the path and the factor that is missing.
          TypeError: A leaf is not an array.
        """
        self._check_shapes(small, large)
        _initial.check(self._expected(), small, large)

    def rescale(self, small: PyTree, large: PyTree) -> PyTree:
        """Return the initial parameters of the large model, each multiplied so that its scale is as the rules say.

        This is all that a model needs whose `init` does not know the rules.

        Args:
          small: Initial parameters of the small model: a tree of arrays.
          large: Those of the large model.

        Returns:
          A tree like `large`, whose standard deviations are those of `small` times `init_std`. Constant parameters
          stay as they are.

        Raises:
          ValueError: The trees are not those that were transferred.
          TypeError: A leaf is not an array.
        """
        self._check_shapes(small, large)
        return _initial.rescaled(self._expected(), small, large)

    def _expected(self) -> list[_initial.Expected]:
        return [_initial.Expected(x.path, x.counterpart, x.factors.init_std) for x in self.parameters]

    def _check_shapes(self, small: PyTree, large: PyTree) -> None:
        for name, tree in (("small", small), ("large", large)):
            found = shapes_of(name, tree)
            for x in self.parameters:
                path, shape = (x.counterpart, x.small) if name == "small" else (x.path, x.large)
                if found.get(path) != shape:
                    raise ValueError(
                        f"{name} has {checks.shortened(path)} of shape {found.get(path)}, expected {shape}: give "
                        "parameters of the models that were transferred"
                    )


_HEADINGS = ("learning rate", "weight decay", "eps", "initial std", "output", "residual")


def transfer(
    opt: GradientTransformation,
    small: PyTree,
    large: PyTree,
    *,
    axes: Axes | None = None,
    blocks: str | None = None,
    output: str = "rate",
    decay: str = "product",
    alpha: float = 1.0,
    batch: float = 1.0,
    steps: float = 1.0,
    data: float | None = None,
    batch_rule: str = "half_life",
) -> Transferred:
    """Return the optimizer of a large model, from one that is tuned on a small model.

    Learning rates, weight decays and eps are scaled by group. In width, the rules are those of the maximal update
    parameterization, muP, for Adam (Yang et al., 2022), in depth those of CompleteP (Dey et al., 2025). Most of the
    groups are inferred from the shapes: an axis that grows is a width, and a kernel is (..., fan-in, fan-out). The
    model has a part in it: initial values, factors of outputs, and scores of attention that are divided by the size
    of a head and not by its root. `Transferred.describe` prints what is set and what is left to do.

    Args:
      opt: An optimizer of this package. It may be in a chain, with schedules, in groups, and in wrappers.
      small: Parameters of the small model: a tree of arrays or of `jax.ShapeDtypeStruct`.
      large: Those of the large model, of the same structure but for the number of blocks.
      axes: The roles of axes where shapes do not tell: a dict from regular expressions, of which the first that is
        found in a path counts, to tuples. A tuple has "in" or "out" for each axis of the layer's inputs or outputs,
        "layers" for one of stacked residual blocks, and None for one that does not count, such as a vocabulary.
      blocks: A regular expression for the name of a residual block in a path, such as "block_[0-9]+", if the numbers
        of residual blocks differ. The output of each block is to be multiplied by the `residual` of its parameters.
      output: "rate" scales learning rate and initial values of output layers (Table 3 of muP), and "multiplier" the
        outputs (Table 8). With the factor of the outputs in place, they are the same model. An embedding
        that is the last layer as well needs "multiplier".
      decay: What stays the same of the decoupled weight decay of matrices whose learning rate shrinks. "product":
        learning rate times weight decay, so that the decay keeps its time scale (CompleteP; Wang & Aitchison,
        2024; Kosson et al., 2025). "sqrt": weight decay grows with the root of the width (Fan et al., 2025). "fixed":
        the weight decay.
      alpha: The power of depth by which the output of a residual block is divided. 1 is CompleteP.
      batch: The factor by which the batch size grows.
      steps: The factor by which the number of updates grows. Schedules are stretched by it.
      data: The factor by which the number of different examples grows; None for `batch * steps`. Learning rate times
        weight decay is multiplied by batch / data: the decay keeps its time scale in epochs (Wang & Aitchison, 2024),
        which with new data is its part of the run (Bergsma et al., 2025).
      batch_rule: How Adam's hyperparameters depend on the batch size; see `adamjax.tuning.scale_for_batch`.

    Returns:
      A transformation, which is a value as `opt` is.

    Raises:
      ValueError: A parameter is in one model only, its shapes do not tell which axis is which (the message has the path
        and the argument that says it), a number is out of range, or `opt` has coupled weight decay.
      TypeError: `opt` is not a transformation or contains one from elsewhere, or a leaf has no shape.

    References:
      Yang et al., 2022, Tensor Programs V, https://arxiv.org/abs/2203.03466, Tables 3 and 8;
      Dey et al., 2025, CompleteP, https://arxiv.org/abs/2505.01618, Table 1;
      Fan et al., 2025, https://arxiv.org/abs/2510.15262; Kosson et al., 2025, https://arxiv.org/abs/2510.19093;
      Wang & Aitchison, 2024, https://arxiv.org/abs/2405.13698; Bergsma et al., 2025, https://arxiv.org/abs/2505.13738.

    >>> import adamjax, jax
    >>> def shapes(width):
    ...     model = adamjax.problems.digits(hidden=(width, width))
    ...     return jax.eval_shape(model.init, jax.random.key(0))
    >>> opt = adamjax.transfer(adamjax.adam(1e-2), shapes(32), shapes(128))
    >>> for row in opt.describe().splitlines():
    ...     print(row[:80])
    parameter       shapes                kind    fan-in  fan-out  depth  learning r
    layer_0/bias    [32] -> [128]         vector  1       4        1      1
    layer_0/kernel  [64,32] -> [64,128]   input   1       4        1      1
    layer_1/bias    [32] -> [128]         vector  1       4        1      1
    layer_1/kernel  [32,32] -> [128,128]  hidden  4       4        1      0.25
    layer_2/bias    [10] -> [10]          fixed   1       1        1      1
    layer_2/kernel  [32,10] -> [128,10]   output  4       1        1      0.25
    """
    opt = as_transformation(opt, "argument opt of transfer")
    checks.choice("output", output, OUTPUTS)
    checks.choice("decay", decay, DECAYS)
    checks.choice("batch_rule", batch_rule, _batch.RULES)
    alpha = _number("alpha", alpha)
    batch, steps = (_factor(name, x) for name, x in (("batch", batch), ("steps", steps)))
    data = None if data is None else _factor("data", data)
    _hyperparameters.check_transferable(opt)
    rules, run = Rules(output, decay, alpha), for_run(batch, steps, data, batch_rule)
    rows = tuple([_scaling(pair, rules, run) for pair in pairs_of(small, large, axes, blocks)])
    return Transferred(_transferred(_hyperparameters.for_run(opt, batch, steps, batch_rule), rows), rows)


def _number(name: str, x: float) -> float:
    found = checks.number(name, x)
    if not isinstance(found, float):
        raise TypeError(f"Invalid {name} value: {checks.shown(x)}; {name} must be a number")
    return found


def _factor(name: str, x: float) -> float:
    if (found := _number(name, x)) <= 0:
        raise ValueError(f"Invalid {name} value: {x}; {name} must be above 0: it is large / small")
    return found


def _scaling(pair: Pair, rules: Rules, run: Factors) -> ParameterScaling:
    path, counterpart, small, large, growth = pair
    factors = product(rules.factors(growth), run)
    return ParameterScaling(path, counterpart, growth.kind, small, large, *growth[1:], factors)


def _transferred(opt: Any, rows: Sequence[ParameterScaling]) -> Any:
    """`opt` with the factors of the rows, in groups around those of its members that treat each parameter by itself.

    Members that look at all gradients at once, such as a clipping by the global norm, keep seeing all.
    """
    if isinstance(opt, Groups):
        return _transferred_groups(opt, rows)
    if isinstance(opt, Wrapper):
        return replaced(opt, {"inner": _transferred(opt.inner, rows)})
    if _hyperparameters.is_leafwise(opt):
        return _grouped(opt, rows)
    if not isinstance(opt, Chain):
        return opt
    members: list[Any] = []
    leafwise: list[Transformation] = []
    for member in (*opt.transforms, None):
        if member is not None and _hyperparameters.is_leafwise(member):
            leafwise.append(member)
            continue
        if leafwise:
            members.append(_grouped(leafwise[0] if len(leafwise) == 1 else Chain(tuple(leafwise)), rows))
        leafwise = []
        if member is not None:
            members.append(_transferred(member, rows))
    return replaced(opt, {"transforms": tuple(members)})


def _grouped(opt: Any, rows: Sequence[ParameterScaling]) -> Any:
    """`opt` with a group for each combination of factors."""
    independent = _hyperparameters.decays_after_rate(opt)
    found: dict[tuple[float, float, float], list[str]] = {}
    for row in rows:
        rate, decay, eps, *_ = row.factors
        found.setdefault((rate, rate * decay if independent else decay, eps), []).append(row.path)
    members = {}
    for factors, paths in found.items():
        if changes := _hyperparameters.overrides(opt, *factors):
            members[_pattern(paths, [row.path for row in rows])] = changes
    return groups(members, default=opt) if members else opt


def _transferred_groups(opt: Groups, rows: Sequence[ParameterScaling]) -> Groups:
    """Groups of groups: the optimizer of each parameter is transferred by itself."""
    by_path = {row.path: row for row in rows}
    owners: dict[tuple[int, ...], list[str]] = {}
    for path, _, owner in opt._owners(dict.fromkeys(by_path, 0)):
        owners.setdefault(owner, []).append(path)
    return groups(
        {
            _pattern(paths, list(by_path)): _transferred(opt._member(owner), [by_path[path] for path in paths])
            for owner, paths in owners.items()
        }
    )


def _pattern(paths: Sequence[str], all_paths: Sequence[str]) -> str:
    """A regular expression for these of all paths, with any number in place of those in names if that is the same."""
    chosen = set(paths)
    short = {re.sub("[0-9]+", "[0-9]+", re.escape(path)) for path in paths}
    alternatives = list(dict.fromkeys(short))
    found = re.compile(f"^(?:{'|'.join(sorted(alternatives))})$")
    if any(found.search(path) for path in all_paths if path not in chosen):
        alternatives = [re.escape(path) for path in paths]
    return f"^(?:{'|'.join(sorted(alternatives))})$"
