"""Protection from bad gradients: steps that are not finite, or spike, are skipped; in float16, the loss is scaled.

A single NaN in the gradients stays in Adam's moments for ever. So does an infinity, which a finite gradient
above 1.8e19 becomes when it is squared in float32. Only gradients with finite squares pass. At any other step,
parameters, moments and count stay as they are, bit for bit, and the step is counted.
"""

from adamjax.safety._check import check as check
from adamjax.safety._check import check_skipped as check_skipped
from adamjax.safety._check import skipped as skipped
from adamjax.safety._check import was_skipped as was_skipped
from adamjax.safety._loss_scale import DynamicLossScale as DynamicLossScale
from adamjax.safety._loss_scale import LossScaleState as LossScaleState
from adamjax.safety._loss_scale import dynamic_loss_scale as dynamic_loss_scale
from adamjax.safety._nonfinite import LeafCounts as LeafCounts
from adamjax.safety._nonfinite import SkipNonfinite as SkipNonfinite
from adamjax.safety._nonfinite import SkipState as SkipState
from adamjax.safety._nonfinite import skip_nonfinite as skip_nonfinite
from adamjax.safety._spikes import RunningStats as RunningStats
from adamjax.safety._spikes import SkipSpikes as SkipSpikes
from adamjax.safety._spikes import SpikeState as SpikeState
from adamjax.safety._spikes import skip_spikes as skip_spikes
