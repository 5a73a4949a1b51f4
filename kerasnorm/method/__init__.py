"""What a method is: its declaration, base layer, adoption from a trained layer, laws.

A file that adds a method takes what it needs from here; see docs/adding-a-method.md.
"""

from kerasnorm.method import adoption as adoption
from kerasnorm.method.normalization import Normalization as Normalization
from kerasnorm.method.registry import FAMILIES as FAMILIES
from kerasnorm.method.registry import INVARIANCES as INVARIANCES
from kerasnorm.method.registry import Adoption as Adoption
from kerasnorm.method.registry import Case as Case
from kerasnorm.method.registry import Edit as Edit
from kerasnorm.method.registry import Fidelity as Fidelity
from kerasnorm.method.registry import Method as Method
from kerasnorm.method.registry import Options as Options
from kerasnorm.method.registry import Reason as Reason
from kerasnorm.method.registry import Refusal as Refusal
from kerasnorm.method.registry import Source as Source
from kerasnorm.method.registry import declare as declare
from kerasnorm.method.registry import get as get
from kerasnorm.method.registry import methods as methods
from kerasnorm.method.registry import read as read
from kerasnorm.method.registry import set_of as set_of
