"""Activation methods, one file each; their layers are names of this package.

>>> kerasnorm.layers.GroupNormalization(groups=4).groups
4
"""
# Written by `make docs`: all layers of the files here.

from kerasnorm.layers.adaptive_instance import (
    AdaptiveInstanceNormalization as AdaptiveInstanceNormalization,
)
from kerasnorm.layers.batch import BatchNormalization as BatchNormalization
from kerasnorm.layers.batch_channel import (
    BatchChannelNormalization as BatchChannelNormalization,
)
from kerasnorm.layers.batch_layer import (
    BatchLayerNormalization as BatchLayerNormalization,
)
from kerasnorm.layers.batch_then_group import (
    BatchThenGroupNormalization as BatchThenGroupNormalization,
)
from kerasnorm.layers.decorrelated import (
    DecorrelatedBatchNormalization as DecorrelatedBatchNormalization,
)
from kerasnorm.layers.divisive import DivisiveNormalization as DivisiveNormalization
from kerasnorm.layers.divisive import Smoothed as Smoothed
from kerasnorm.layers.dynamic_tanh import DynamicTanh as DynamicTanh
from kerasnorm.layers.evonorm_b0 import EvoNormB0 as EvoNormB0
from kerasnorm.layers.evonorm_s0 import EvoNormS0 as EvoNormS0
from kerasnorm.layers.exemplar import ExemplarNormalization as ExemplarNormalization
from kerasnorm.layers.filter_response import (
    FilterResponseNormalization as FilterResponseNormalization,
)
from kerasnorm.layers.general_batch import (
    GeneralBatchNormalization as GeneralBatchNormalization,
)
from kerasnorm.layers.ghost import GhostBatchNormalization as GhostBatchNormalization
from kerasnorm.layers.group import GroupNormalization as GroupNormalization
from kerasnorm.layers.instance import InstanceNormalization as InstanceNormalization
from kerasnorm.layers.iterative import IterativeNormalization as IterativeNormalization
from kerasnorm.layers.l1 import L1BatchNormalization as L1BatchNormalization
from kerasnorm.layers.layer import LayerNormalization as LayerNormalization
from kerasnorm.layers.local_response import (
    LocalResponseNormalization as LocalResponseNormalization,
)
from kerasnorm.layers.lp import LpBatchNormalization as LpBatchNormalization
from kerasnorm.layers.mecta import MectaNormalization as MectaNormalization
from kerasnorm.layers.online import OnlineNormalization as OnlineNormalization
from kerasnorm.layers.pixel import PixelNormalization as PixelNormalization
from kerasnorm.layers.positional import MomentShortcut as MomentShortcut
from kerasnorm.layers.positional import (
    PositionalNormalization as PositionalNormalization,
)
from kerasnorm.layers.power import PowerNormalization as PowerNormalization
from kerasnorm.layers.renorm import BatchRenormalization as BatchRenormalization
from kerasnorm.layers.rms import RMSNormalization as RMSNormalization
from kerasnorm.layers.sample import SampleNormalization as SampleNormalization
from kerasnorm.layers.scale import ScaleNormalization as ScaleNormalization
from kerasnorm.layers.sparse_batch import (
    SparseBatchNormalization as SparseBatchNormalization,
)
from kerasnorm.layers.sparse_layer import (
    SparseLayerNormalization as SparseLayerNormalization,
)
from kerasnorm.layers.stochastic_whitening import (
    StochasticWhiteningBatchNormalization as StochasticWhiteningBatchNormalization,
)
from kerasnorm.layers.streaming import StreamingNormalization as StreamingNormalization
from kerasnorm.layers.switchable import (
    SwitchableNormalization as SwitchableNormalization,
)
from kerasnorm.layers.sync import (
    SynchronizedBatchNormalization as SynchronizedBatchNormalization,
)
from kerasnorm.layers.time_specific import (
    TimeSpecificBatchNormalization as TimeSpecificBatchNormalization,
)
from kerasnorm.layers.variance import VarianceNormalization as VarianceNormalization
from kerasnorm.layers.weighted import WeightedNormalization as WeightedNormalization
