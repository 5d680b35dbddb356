"""Tuning: settings of an optimizer, tried and judged by validation performance."""

from adamjax.problems import Problem as Problem
from adamjax.tuning._batch_size import scale_for_batch as scale_for_batch
from adamjax.tuning._confirmed import Confirmed as Confirmed
from adamjax.tuning._executors import process_pool as process_pool
from adamjax.tuning._journal import TrialRecord as TrialRecord
from adamjax.tuning._range_test import LrRange as LrRange
from adamjax.tuning._range_test import lr_range_test as lr_range_test
from adamjax.tuning._report import Best as Best
from adamjax.tuning._report import Report as Report
from adamjax.tuning._search import Search as Search
from adamjax.tuning._space import Choice as Choice
from adamjax.tuning._space import Linear as Linear
from adamjax.tuning._space import Log as Log
from adamjax.tuning._space import Space as Space
from adamjax.tuning._sweep import Sweep as Sweep
from adamjax.tuning._sweep import sweep as sweep
from adamjax.tuning._trial import Pruned as Pruned
from adamjax.tuning._trial import Trial as Trial
from adamjax.tuning._tune import tune as tune
