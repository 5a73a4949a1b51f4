"""Surgery on any Keras model: load, find, replace, carry over, compare, save.

Knows no normalization and never imports kerasnorm.
"""

from rewriters.compare import Comparison as Comparison
from rewriters.compare import compare as compare
from rewriters.compare import random_inputs as random_inputs
from rewriters.compare import rounding as rounding
from rewriters.edit import Edited as Edited
from rewriters.edit import edit as edit
from rewriters.errors import RewriteError as RewriteError
from rewriters.graph import Site as Site
from rewriters.graph import SiteMap as SiteMap
from rewriters.graph import sites as sites
from rewriters.program import Program as Program
