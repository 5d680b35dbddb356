"""A setting that was confirmed with fresh seeds."""

import dataclasses
import math

import numpy as np

from adamjax.tuning._space import Setting


@dataclasses.dataclass(frozen=True)
class Confirmed:
    """A setting that was run again with fresh seeds.

    Fields:
      number: Number of its trial. Those of the best setting at constant learning rates come after all of the search.
      name: The name in tables and pictures: the defaults, a constant rate, or the number of a trial.
      setting: Keyword arguments of the optimizer.
      seeds: The fresh seeds.
      values: The metric at the end, for each seed; NaN for a run that diverged.
      finalist: Whether it stayed in the race to the end. Others were eliminated, and have fewer seeds.
      tied: Whether it is indistinguishable from the best by a paired t-test at 95 % confidence, on the seeds that both
        have. If all values are positive, the test compares their logarithms, since the noise of a loss is in proportion
        to the loss.
    """

    number: int
    name: str
    setting: Setting
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    finalist: bool
    tied: bool

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; NaN for a single seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:.4g}" + (f" ± {self.spread:.2g}" if math.isfinite(self.spread) else "")
