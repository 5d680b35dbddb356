"""States on many devices: which device has what, ZeRO-1, and moments in the memory of the host."""

from adamjax.sharding._layout import describe as describe
from adamjax.sharding._layout import init_sharded as init_sharded
from adamjax.sharding._layout import state_sharding as state_sharding
from adamjax.sharding._offload import offload as offload
from adamjax.sharding._zero1 import Zero1State as Zero1State
from adamjax.sharding._zero1 import zero1 as zero1
from adamjax.sharding._zero1_mapped import zero1_mapped as zero1_mapped
