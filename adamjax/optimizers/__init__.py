"""The optimizers: chains of transformations that other modules define."""

from adamjax.optimizers._adam import adam as adam
from adamjax.optimizers._adam import adamax as adamax
from adamjax.optimizers._adam import adamaxw as adamaxw
from adamjax.optimizers._adam import adamw as adamw
from adamjax.optimizers._adam import amsgrad as amsgrad
from adamjax.optimizers._adam import nadam as nadam
from adamjax.optimizers._adam import nadamw as nadamw
from adamjax.optimizers._adam import radam as radam
from adamjax.optimizers._since_adam import adam_atan2 as adam_atan2
from adamjax.optimizers._since_adam import ademamix as ademamix
from adamjax.optimizers._since_adam import adopt as adopt
from adamjax.optimizers._since_adam import simplified_ademamix as simplified_ademamix
from adamjax.optimizers._since_adam import stable_adamw as stable_adamw
