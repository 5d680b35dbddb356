"""The specification of a tuning: the arguments that decide its result, the space to search, and names for it all."""

import dataclasses
import hashlib
import inspect
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from adamjax._core import checks
from adamjax._core.low_precision import is_low_precision
from adamjax._core.trees import abstract_key
from adamjax._core.typing import PyTree
from adamjax.optimizers import adamw
from adamjax.problems import Problem
from adamjax.problems._task import Task
from adamjax.tuning import _limits
from adamjax.tuning._courses import OWN, Scheduled
from adamjax.tuning._journal import Json
from adamjax.tuning._optuna import Sampler, Storage
from adamjax.tuning._ranges import WHEN_ASKED, default_ranges
from adamjax.tuning._space import Choice, OptimizerFactory, Setting, Space, stable_repr
from adamjax.tuning._strategy import RANGES, Stages, stage_groups
from adamjax.tuning._sweep import make_optimizer

if TYPE_CHECKING:
    from typing_extensions import TypeIs

SAMPLERS = ("auto", "halton", "sobol", "random")

Confirm = Sequence[int] | Sequence[Sequence[int]] | None  # a pair, or the pairs of a race
RACE = ((8, 2), (5, 4), (3, 8))

Subject = Problem | Callable[..., Any] | str  # what trials train: a problem, an objective, or a name for it


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """The arguments of a search that decide its result, checked."""

    problem: Subject
    optimizer: OptimizerFactory
    space: Space  # to search; see `search_space`
    stages: Stages
    sampler: Sampler
    trials: int
    steps: int | None
    confirm: Confirm
    metric: str
    mode: str
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("steps", 1), ("seed", 0)):
            if name != "steps" or self.steps is not None:
                object.__setattr__(self, name, self._count(name, getattr(self, name), least))
        if self.confirm is not None:
            object.__setattr__(self, "confirm", _checked_confirm(self.confirm))
        if max(self.seeds) >= 2**31:
            seeds = "seed, and the seeds after it that confirm,"
            raise ValueError(f"Invalid seed value: {self.seed}; {seeds} must be below 2**31")
        make_optimizer(self.optimizer, self.defaults, 0)

    @cached_property
    def defaults(self) -> Setting:
        """The optimizer's default setting; for arguments without a default, adamw's or the middle of the range."""
        parameters = [p for f in (adamw, self.optimizer) for p in inspect.signature(f).parameters.values()]
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        middle = self.space.at(dict.fromkeys(self.space.free, 0.5))
        found = middle | {name: defaults[name] for name in self.space.free if name in defaults}
        # Users who tune nothing keep the rate constant.
        return found | {name: x for name, x in OWN.items() if name in found and isinstance(self.optimizer, Scheduled)}

    def _count(self, name: str, x: object, least: int) -> int:
        if name == "steps" and is_problem(self.problem):
            return _limits.steps(name, x, least)
        return _limits.runs(name, x, least) if name == "trials" else checks.count(name, x, least)

    @property
    def race(self) -> list[tuple[int, int]]:
        """The rounds of the confirmation: the number of settings, and that of their seeds so far."""
        confirm: Any = self.confirm or []
        return [tuple(pair) for pair in ([confirm] if confirm and isinstance(confirm[0], int) else confirm)]

    @property
    def seeds(self) -> tuple[int, int]:
        """The two seeds of the search; those that confirm lie between them."""
        return self.seed, self.seed + 1 + max((seeds for _, seeds in self.race), default=0)

    @property
    def is_staged(self) -> bool:
        """Whether the search goes by stages."""
        own = isinstance(self.sampler, str) and self.sampler in SAMPLERS
        return own and not self.has_model

    @property
    def has_model(self) -> bool:
        """Whether a model of the scores proposes the settings."""
        return isinstance(self.sampler, str) and self.sampler == "auto" and isinstance(self.stages, str)

    @property
    def has_constant_rates(self) -> bool:
        """Whether the best is confirmed at constant rates, too: where rates are scheduled and runs are populations."""
        return isinstance(self.optimizer, Scheduled) and is_problem(self.problem)

    @cached_property
    def question(self) -> Json:
        """The specification in JSON's types, as the journal and the report keep it."""
        shapes = {"parameters": parameter_summary(self.problem)} if is_problem(self.problem) else {}
        scheduled = self.optimizer if isinstance(self.optimizer, Scheduled) else None
        return {
            "problem": subject_name(self.problem),
            **shapes,
            "optimizer": optimizer_name(scheduled.make if scheduled else self.optimizer),
            "schedule": scheduled.course if scheduled else "constant",
            "space": stable_repr(self.space),
            "stages": self.stages if isinstance(self.stages, str) else list(map(list, stage_groups(self.stages))),
            "sampler": self.sampler if isinstance(self.sampler, str) else type(self.sampler).__name__,
        } | {name: getattr(self, name) for name in ("trials", "steps", "confirm", "metric", "mode", "seed")}

    @property
    def digest(self) -> str:
        """A short hash of the question, which names the study of a tuning."""
        return hashlib.sha256(json.dumps(self.question).encode()).hexdigest()[:12]


def _checked_pair(name: str, pair: Sequence[int]) -> list[int]:
    best, seeds = pair
    return [checks.count(f"{name}[0]", best), _limits.runs(f"{name}[1]", seeds)]


def _checked_confirm(confirm: Any) -> list[int] | list[list[int]]:
    """Return a checked pair of a number of settings and one of seeds, or a checked list of such pairs."""
    kind = "confirm must be two ints, or pairs of them with fewer settings and more seeds in each, or None"
    if not isinstance(confirm, Sequence) or isinstance(confirm, str) or not confirm:
        raise ValueError(f"Invalid confirm value: {confirm!r}; {kind}")
    if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in confirm):
        if len(confirm) != 2:
            raise ValueError(f"Invalid confirm value: {confirm!r}; {kind}")
        return _checked_pair("confirm", confirm)
    pairs = [_checked_pair(f"confirm[{i}]", pair) for i, pair in enumerate(confirm)]
    if any(later[0] > first[0] or later[1] <= first[1] for first, later in itertools.pairwise(pairs)):
        raise ValueError(f"Invalid confirm value: {confirm!r}; {kind}")
    return pairs


def search_space(
    optimizer: OptimizerFactory, space: Space | None, stages: Stages, *, half: bool, structures: bool = True
) -> Space:
    """Return the arguments in `stages` of `space`, or of the default ranges of the arguments that `optimizer` takes.

    Arguments that `functools.partial` fixes are not searched. Nor are, unless a stage names them, eps if `half` is
    False, AMSGrad, which changes the structure of the optimizer, if `structures` is False, and other such choices.
    """
    if stages != "adam" and (isinstance(stages, str) or not isinstance(stages, Sequence)):
        kind = ValueError if isinstance(stages, str) else TypeError
        raise kind(f'Invalid stages value: {stages!r}; stages must be "adam", or the arguments of each stage')
    groups = stage_groups(stages)
    asked = list(itertools.chain.from_iterable(groups))
    if not isinstance(stages, str) and not (groups and all(stages)):
        raise ValueError(f"Invalid stages value: {stages!r}; every stage needs at least one argument")
    if not isinstance(space, Space | None):
        raise TypeError(f"Invalid space value: {space!r}; space must be a Space, or None")
    if space is not None:
        known, ranges = space.free, space.ranges
    else:
        ranges = default_ranges(optimizer)
        known = list(ranges)
        if not asked:
            ranges = {n: r for n, r in ranges.items() if n not in WHEN_ASKED and (half or n != "eps")}
        if not structures and not asked:
            ranges = {name: r for name, r in ranges.items() if not isinstance(r, Choice)}
    for name in asked:
        if name not in known:
            raise ValueError(f"Invalid stages value: {name!r} has no range, only {', '.join(known)}; add one to space")
    if asked:
        ranges = {n: r for n, r in ranges.items() if n in asked or n not in known}
    if not ranges:
        raise ValueError(f"{optimizer_name(optimizer)} has none of the arguments {', '.join(RANGES)}: give a space")
    return Space.of(ranges)


def optimizer_name(optimizer: Callable[..., object]) -> str:
    """Return an expression for an optimizer or another function, such as adamjax.adamw, as far as there is one."""
    if isinstance(optimizer, partial):
        keywords = (f"{k}={stable_repr(x)}" for k, x in optimizer.keywords.items())
        given = [optimizer_name(optimizer.func), *map(stable_repr, optimizer.args), *keywords]
        return f"functools.partial({', '.join(given)})"
    if not hasattr(optimizer, "__qualname__") or not optimizer.__module__:
        return stable_repr(optimizer)
    package, name = optimizer.__module__.split(".")[0], optimizer.__qualname__
    modules = [m for m in sorted(sys.modules) if m.split(".")[0] == package and "._" not in m]
    public = [m for m in modules if getattr(sys.modules[m], "__dict__", {}).get(name) is optimizer]
    return f"{min(public, key=len, default=optimizer.__module__)}.{name}"


def is_problem(x: object) -> "TypeIs[Problem]":
    """Return whether `x` is meant as a problem, rather than as an objective, which is a function."""
    return all(hasattr(x, name) for name in ("init", "loss")) or not (isinstance(x, str) or callable(x))


def subject_name(problem: Subject) -> str:
    """Return the name of an objective; or the `repr` of a problem, or its class if that would be an address."""
    if isinstance(problem, str):
        return problem
    if not is_problem(problem):
        return optimizer_name(problem)
    return type(problem).__qualname__ if type(problem).__repr__ is object.__repr__ else stable_repr(problem)


def parameter_summary(problem: Problem) -> str:
    """Return a short description of the parameters that differs between trees."""
    leaves = jax.tree.leaves_with_path(abstract_params(problem))
    digest = hashlib.sha256(str([(path, x.shape, str(x.dtype)) for path, x in leaves]).encode())
    return f"{sum(x.size for _, x in leaves)} in {len(leaves)} arrays ({digest.hexdigest()[:8]})"


def has_half_precision(problem: Problem) -> bool:
    dtypes = {x.dtype for x in jax.tree.leaves(abstract_params(problem))}
    return any(jnp.issubdtype(d, jnp.floating) and is_low_precision(d) for d in dtypes)


def abstract_params(problem: Problem) -> PyTree:
    return jax.eval_shape(Task(problem).init, abstract_key()).params


def check_sampler(sampler: Sampler, storage: Storage) -> None:
    ours = isinstance(sampler, str) and sampler in SAMPLERS
    if isinstance(sampler, str) and not ours and sampler.split(":")[0] != "optuna":
        names = ", ".join(map(repr, SAMPLERS))
        raise ValueError(f"Invalid sampler value: {sampler!r}; sampler must be one of {names}, 'optuna', or a study")
    if storage is not None and ours:
        raise ValueError(f"Invalid storage value: {storage!r}; only Optuna's samplers have a storage")
    if (storage is not None or not isinstance(sampler, str)) and jax.process_count() > 1:
        raise ValueError("Invalid storage value: the processes of one program would each ask for other settings")
