"""Methods that normalize weights, one file each; their layers are names of it.

>>> kerasnorm.weights.WeightNormalization(keras.layers.Dense(3)).layer.units
3
"""

from kerasnorm.method import layers_of as _layers_of


globals().update(_layers_of(__name__, __path__))
