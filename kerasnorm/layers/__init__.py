"""Activation methods, one file each; their layers are names of this package.

>>> kerasnorm.layers.GroupNormalization(groups=4).groups
4
"""

from kerasnorm.method import layers_of as _layers_of


globals().update(_layers_of(__name__, __path__))
