"""jaxquant: pure-functional quantization for JAX."""

from jaxquant.encode import fake_quantize as fake_quantize
from jaxquant.encode import quantize as quantize
from jaxquant.format import Format as Format
from jaxquant.format import fp8 as fp8
from jaxquant.format import int2 as int2
from jaxquant.format import int3 as int3
from jaxquant.format import int4 as int4
from jaxquant.format import int8 as int8
from jaxquant.format import nf4 as nf4
from jaxquant.matmul import dot_general as dot_general
from jaxquant.params import quantize_params as quantize_params
from jaxquant.qtensor import QTensor as QTensor
from jaxquant.qtensor import dequantize as dequantize
from jaxquant.transforms.explain import Explanation as Explanation
from jaxquant.transforms.explain import explain as explain
from jaxquant.transforms.quantized import quantized as quantized
