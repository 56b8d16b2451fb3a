"""Programs compiled for a GPU on a machine that has none: what the compiler made of them, and whether they fit."""

from jaxquant.lowering.lower import lower_for as lower_for
from jaxquant.lowering.program import Collective as Collective
from jaxquant.lowering.program import Multiplication as Multiplication
from jaxquant.lowering.program import Program as Program
