"""Change the normalization of a trained Keras model without losing what it learned.

new = kerasnorm.rewrite("model.h5", "gn", data=x, fit="refit")
"""

import importlib as _importlib
import sys as _sys

from kerasnorm import adversarial as adversarial
from kerasnorm import callbacks as callbacks
from kerasnorm import layers as layers
from kerasnorm import properties as properties
from kerasnorm import recurrent as recurrent
from kerasnorm import sphere as sphere
from kerasnorm import weights as weights
from kerasnorm.common.errors import KerasNormError as KerasNormError
from kerasnorm.method import testing as testing
from kerasnorm.method.normalization import Normalization as Normalization
from kerasnorm.method.registry import Fidelity as Fidelity
from kerasnorm.method.registry import Method as Method
from kerasnorm.method.registry import Reason as Reason
from kerasnorm.method.registry import declare as declare
from kerasnorm.method.registry import methods as methods
from kerasnorm.numerics import replicas as replicas
from kerasnorm.properties.compass import compass as compass
from kerasnorm.rewriting import addons as _addons  # noqa: F401 - registers layers
from kerasnorm.rewriting.apply import rewrite as rewrite
from kerasnorm.rewriting.export import export as export
from kerasnorm.rewriting.plan import Plan as Plan
from kerasnorm.rewriting.plan import Refused as Refused
from kerasnorm.rewriting.plan import Step as Step
from kerasnorm.rewriting.plan import plan as plan
from kerasnorm.rewriting.report import Report as Report
from kerasnorm.runtime.compilation import jit as jit
from rewriters.errors import RewriteError as RewriteError
from rewriters.formats import load as load


__version__ = "0.1.0"

# What is imported above under its own name; a test compares.
__all__ = [
    "Fidelity",
    "KerasNormError",
    "Method",
    "Normalization",
    "Plan",
    "Reason",
    "Refused",
    "Report",
    "RewriteError",
    "Step",
    "__version__",
    "adversarial",
    "callbacks",
    "compass",
    "declare",
    "export",
    "jit",
    "layers",
    "load",
    "methods",
    "plan",
    "properties",
    "recurrent",
    "replicas",
    "rewrite",
    "sphere",
    "testing",
    "weights",
]

# Packages that declare methods found these here before they moved to `method`.
for _name in ("adoption", "claims", "normalization", "testing"):
    _module = _importlib.import_module(f"{__name__}.method.{_name}")
    _sys.modules[f"{__name__}.{_name}"] = _module


def __dir__() -> list[str]:
    return __all__
