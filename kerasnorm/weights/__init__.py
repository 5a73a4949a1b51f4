"""Methods that normalize weights, one file each; their layers are names of it.

>>> kerasnorm.weights.WeightNormalization(keras.layers.Dense(3)).layer.units
3
"""
# Written by `make docs`: all layers of the files here.

from kerasnorm.weights.analytic import AnalyticNormalization as AnalyticNormalization
from kerasnorm.weights.centred import (
    CentredWeightNormalization as CentredWeightNormalization,
)
from kerasnorm.weights.cosine import CosineNormalization as CosineNormalization
from kerasnorm.weights.hypersphere import (
    HypersphereNormalization as HypersphereNormalization,
)
from kerasnorm.weights.hypersphere import HypersphereResidual as HypersphereResidual
from kerasnorm.weights.hypersphere import normalize_weights as normalize_weights
from kerasnorm.weights.orthogonal import (
    OrthogonalWeightNormalization as OrthogonalWeightNormalization,
)
from kerasnorm.weights.scaled_standardization import (
    ScaledWeightStandardization as ScaledWeightStandardization,
)
from kerasnorm.weights.scaling import rescale as rescale
from kerasnorm.weights.spectral import SpectralNormalization as SpectralNormalization
from kerasnorm.weights.sphere import SphereNormalization as SphereNormalization
from kerasnorm.weights.standardization import (
    WeightStandardization as WeightStandardization,
)
from kerasnorm.weights.weight import WeightNormalization as WeightNormalization
