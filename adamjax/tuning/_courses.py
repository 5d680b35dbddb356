"""Optimizers whose learning rate takes a course over a run, the numbers of which are arguments like any other."""

import dataclasses
import inspect

from adamjax import schedules
from adamjax._core import checks
from adamjax._core.typing import GradientTransformation, ScalarOrSchedule
from adamjax._transforms.schedule import Schedule
from adamjax.tuning._space import OptimizerFactory, Setting

COURSES = ("cosine", "linear", "stable")
DECAY_OF_STABLE = 0.2  # fraction of the steps
OWN = {"warmup_fraction": 0.0, "end_fraction": 1.0}  # arguments of a course; the defaults are a constant rate
TYPICAL = {"warmup_fraction": 0.05, "end_fraction": 0.0}  # where they are not searched


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """Makes optimizers whose `learning_rate`, a number, is the peak of a schedule over so many steps.

    Fields:
      make: Called with a schedule as its `learning_rate`, and the other arguments, returns the optimizer.
      course: "cosine", "linear" or "stable".
      steps: Number of steps, at the last of which the course ends.
    """

    make: OptimizerFactory
    course: str
    steps: int

    @property
    def __signature__(self) -> inspect.Signature:
        """The arguments of `make`, and those of the course; the defaults are a constant rate."""
        parameters = list(inspect.signature(self.make).parameters.values())
        kind = inspect.Parameter.KEYWORD_ONLY
        own = [inspect.Parameter(name, kind, default=default) for name, default in OWN.items()]
        rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
        return inspect.Signature([*(p for p in parameters if p.kind is not p.VAR_KEYWORD), *own, *rest])

    def arguments(self, setting: Setting) -> Setting:
        """Return the arguments of `make` in a setting: the schedule in place of its numbers."""
        rate, others = setting["learning_rate"], {n: x for n, x in setting.items() if n not in ("learning_rate", *OWN)}
        if not callable(rate):  # a range test brings its own schedule
            rate = course_schedule(self.course, self.steps, setting)
        return {"learning_rate": rate} | others

    def __call__(
        self,
        learning_rate: ScalarOrSchedule,
        *,
        warmup_fraction: float = 0.0,
        end_fraction: float = 1.0,
        **others: object,
    ) -> GradientTransformation:
        own = {"warmup_fraction": warmup_fraction, "end_fraction": end_fraction}
        return self.make(**self.arguments({"learning_rate": learning_rate} | own | others))


def course_schedule(course: str, steps: int, setting: Setting) -> Schedule:
    """Return the schedule of a setting: its course over so many steps.

    Raises:
      ValueError: A fraction is out of range.
    """
    peak, (warmup_fraction, end_fraction) = setting["learning_rate"], (setting.get(n, x) for n, x in OWN.items())
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"Invalid warmup_fraction value: {warmup_fraction}; warmup_fraction must be in [0, 1)")
    if not 0 <= end_fraction <= 1:
        raise ValueError(f"Invalid end_fraction value: {end_fraction}; end_fraction must be in [0, 1]")
    end, warmup = end_fraction * peak, min(round(warmup_fraction * steps), steps - 1)
    if course == "cosine":
        return schedules.warmup_cosine(peak, warmup_steps=warmup, total_steps=steps, end=end)
    longest = steps - warmup
    decay = longest if course == "linear" else min(max(round(DECAY_OF_STABLE * steps), 1), longest)
    return schedules.warmup_stable_decay(peak, warmup_steps=warmup, total_steps=steps, decay_steps=decay, end=end)


def is_scheduled(setting: Setting) -> bool:
    """Return whether the learning rate of a setting changes in the course of a run."""
    return any(setting.get(name, constant) != constant for name, constant in OWN.items())


def with_course(optimizer: OptimizerFactory, course: str, steps: int | None) -> OptimizerFactory:
    """Return an optimizer whose learning rate takes a course; "auto" is "cosine" where that is possible.

    It is where the number of steps is known, and the optimizer has a learning rate that can be a schedule, and no
    warmup of its own, as schedule-free ones have.

    Raises:
      ValueError: `course` is unknown, or is not possible.
    """
    checks.choice("schedule", course, ("auto", *COURSES, "constant"))
    if course == "constant":
        return optimizer
    obstacle = "" if steps is not None else "the number of steps is unknown: give steps"
    if "warmup_steps" in inspect.signature(optimizer).parameters:
        obstacle = "the optimizer has warmup_steps of its own, and wants a constant rate afterwards"
    if own := OWN.keys() & inspect.signature(optimizer).parameters.keys():
        obstacle = f"the optimizer has an argument {min(own)} of its own"
    if not obstacle:
        try:
            optimizer(learning_rate=schedules.constant(1e-3))
        except (TypeError, ValueError) as error:
            obstacle = f"the optimizer takes no schedule as its learning_rate ({error})"
    if obstacle or steps is None:
        if course != "auto":
            raise ValueError(f"Invalid schedule value: {course!r}; {obstacle}")
        return optimizer
    return Scheduled(optimizer, "cosine" if course == "auto" else course, steps)
