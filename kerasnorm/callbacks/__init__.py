"""Callbacks for `fit`."""

from kerasnorm.callbacks.adversarial_evaluation import (
    AdversarialEvaluation as AdversarialEvaluation,
)
from kerasnorm.callbacks.property_monitor import PropertyMonitor as PropertyMonitor
from kerasnorm.callbacks.sphere_monitor import SphereMonitor as SphereMonitor
from kerasnorm.weights.scaling import NodeRescaling as NodeRescaling
