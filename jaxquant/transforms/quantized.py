"""`quantized`: a function of parameters becomes the same function over `QTensor`s."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxquant import matmul, trace
from jaxquant.adapter import entered, is_leaf
from jaxquant.format import Format, int8
from jaxquant.turned import straightened


def quantized(fn: Callable, *, activations: Format | None = int8, outliers: int = 0) -> Callable:
    """Runs an unmodified function on quantized parameters.

        quantized(fn)(qparams, x)  means  fn(dequantize(qparams), x)

    and only the arithmetic differs: a matmul or convolution that meets integer codes quantizes its activations, a
    scale per token, and multiplies `int8 x int8 -> int32`; look-ups decode the rows they pick; every other operation
    gets the decoded array. `jq.explain` tells which is which.

    The result is ordinary JAX: compose it with `jax.jit` (do: it does not compile by itself and traces at each call),
    `jax.grad`, `jax.vmap`, `jax.export`. Differentiate outside, `grad(quantized(f))`, or the backward matmuls are
    quantized too. A `QTensor` returned unchanged is returned as it is; what is derived from one is a float array.

    Args:
      fn: a pure function of pytrees: `model.apply`, `lambda state, x: nnx.merge(graphdef, state)(x)`, an Equinox or
        Haiku forward, plain JAX. `QTensor`s may stand in any argument. Arguments that are not arrays are static.
      activations: the per-token format of the activations, or None to keep them in floating point (weight-only), at
        the precision that the matmul asks for, or `jax.default_matmul_precision`. The default is float32 on a CPU and
        TF32 on a GPU; "highest" keeps all bits; "BF16_BF16_F32" allows rounding to bfloat16 first, which GPUs and some
        CPUs multiply twice as fast.
      outliers: how many of each token's largest activations are multiplied in floating point, beside the integer
        matmul of the others (matmuls only). One is enough for most of a language model's loss; against a turned
        weight it costs a fifth to a third of a small matmul of one row. LLM.int8(), arXiv:2208.07339.

    Returns:
      A function of the same arguments and results.

    Raises:
      FormatError: `activations` is not an integer format per token.
    """
    return under(fn, matmul.rules(activations, outliers))


def under(fn: Callable, rules: trace.Rules) -> Callable:
    """The function evaluated under rules for `QTensor`s; leaves that come back unchanged are those that went in."""

    @functools.wraps(fn)
    def walked(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
        inside = [entered(leaf) for leaf in leaves]
        run = trace.transform(straightened(fn, leaves), rules)
        args, kwargs = treedef.unflatten(inside)
        came_in = {id(new): old for new, old in zip(inside, leaves, strict=True) if new is not old}
        return jax.tree.map(lambda out: came_in.get(id(out), out), run(*args, **kwargs), is_leaf=matmul.is_param)

    return walked
