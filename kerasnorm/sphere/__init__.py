"""Weights on spheres: which can be, how they get there, optimizers that stay there.

>>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4),
...                           keras.layers.BatchNormalization()])
>>> kerasnorm.sphere.scale_invariant_weights(model)["dense/kernel"].granularity
'filter'
"""

from kerasnorm.sphere import geometry as geometry
from kerasnorm.sphere.invariance import (
    scale_invariant_weights as scale_invariant_weights,
)
from kerasnorm.sphere.named import SGDP as SGDP
from kerasnorm.sphere.named import AdamP as AdamP
from kerasnorm.sphere.named import SphereAdam as SphereAdam
from kerasnorm.sphere.named import SphereSGD as SphereSGD
from kerasnorm.sphere.optimizers import OnSphere as OnSphere
