"""The walker: evaluates a function's jaxpr and hands every operation that meets a parameter to a rule.

It knows nothing of quantization, and it is the only room that looks inside an equation.
"""

from jaxquant.trace.param import Param as Param
from jaxquant.trace.param import Plain as Plain
from jaxquant.trace.provenance import Origin as Origin
from jaxquant.trace.walk import Equation as Equation
from jaxquant.trace.walk import Recorded as Recorded
from jaxquant.trace.walk import Rules as Rules
from jaxquant.trace.walk import argument_name as argument_name
from jaxquant.trace.walk import path_name as path_name
from jaxquant.trace.walk import record as record
from jaxquant.trace.walk import stage as stage
from jaxquant.trace.walk import transform as transform
from jaxquant.trace.walk import walk as walk
