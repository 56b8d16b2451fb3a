"""Algorithms that choose the codes of a matrix, one file each, all of one shape: `(weight, stats) -> QTensor`."""

from jaxquant.quantizers.at_bits import at_bits as at_bits
from jaxquant.quantizers.awq import awq as awq
from jaxquant.quantizers.gptq import gptq as gptq
from jaxquant.quantizers.half_scales import half_scales as half_scales
from jaxquant.quantizers.hqq import hqq as hqq
from jaxquant.quantizers.outliers import outliers as outliers
from jaxquant.quantizers.quantizer import Quantizer as Quantizer
from jaxquant.quantizers.ranges import absmax as absmax
from jaxquant.quantizers.ranges import least_squares as least_squares
from jaxquant.quantizers.rotated import rotated as rotated
from jaxquant.quantizers.rtn import as_quantizer as as_quantizer
from jaxquant.quantizers.rtn import rtn as rtn
from jaxquant.quantizers.smoothquant import smoothquant as smoothquant
from jaxquant.quantizers.stochastic import stochastic as stochastic
