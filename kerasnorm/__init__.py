"""Change the normalization of a trained Keras model without losing what it learned.

new = kerasnorm.rewrite("model.h5", "gn", data=x, fit="refit")
"""

import importlib as _importlib

from kerasnorm import compat as _compat  # noqa: F401 - registers foreign layers
from kerasnorm.compilation import jit as jit
from kerasnorm.errors import KerasNormError as KerasNormError
from kerasnorm.export import export as export
from kerasnorm.method import Method as Method
from kerasnorm.method import declare as declare
from kerasnorm.method import methods as methods
from kerasnorm.normalization import Normalization as Normalization
from kerasnorm.swap.apply import rewrite as rewrite
from kerasnorm.swap.plan import Plan as Plan
from kerasnorm.swap.plan import plan as plan
from kerasnorm.swap.report import Report as Report
from rewriters.errors import RewriteError as RewriteError
from rewriters.formats import load as load


__version__ = "0.1.0"


# Functions of packages that are imported when first asked for.
_FUNCTIONS = {"compass": "properties"}


def __getattr__(name: str) -> object:
    """`kerasnorm.sphere` and the like, imported when first asked for."""
    if name in _FUNCTIONS:
        module = _importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}")
        return getattr(module, name)
    if not name.startswith("_"):
        try:
            return _importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
