"""Matmuls, convolutions and look-ups with a `QTensor`, in the best form for each shape and platform.

The only room that knows which formulation is fast where.
"""

from jaxquant.matmul.backward import Backward as Backward
from jaxquant.matmul.choice import FLOAT as FLOAT
from jaxquant.matmul.choice import INTEGER as INTEGER
from jaxquant.matmul.choice import WEIGHT_ONLY as WEIGHT_ONLY
from jaxquant.matmul.dot import make_dot as make_dot
from jaxquant.matmul.general import dot_general as dot_general
from jaxquant.matmul.lookup import pick_matrices as pick_matrices
from jaxquant.matmul.ragged import is_plain as is_plain
from jaxquant.matmul.rules import Meeting as Meeting
from jaxquant.matmul.rules import is_param as is_param
from jaxquant.matmul.rules import rules as rules
