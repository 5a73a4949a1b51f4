"""Properties that predict how a model trains, and the choice between methods.

`measure` reads them off a model; `compass` puts the model under every method first.
"""

from kerasnorm.properties.compass import Candidate as Candidate
from kerasnorm.properties.compass import Compass as Compass
from kerasnorm.properties.compass import compass as compass
from kerasnorm.properties.measure import Measurer as Measurer
from kerasnorm.properties.measure import measure as measure
from kerasnorm.properties.measurement import Measurement as Measurement
from kerasnorm.properties.measurement import Site as Site
