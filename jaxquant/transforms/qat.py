"""`qat`: a function of float parameters that sees in training what the quantized one sees when it serves."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Key, PyTree

from jaxquant import matmul
from jaxquant.errors import OptionError
from jaxquant.format import Format, int8
from jaxquant.learned import clipped, is_learned, plain, stepped, trained
from jaxquant.params import is_matrix, quantize_params
from jaxquant.qtensor import is_qtensor
from jaxquant.quantizers import Quantizer, as_quantizer
from jaxquant.stats import Stats
from jaxquant.trace import path_name
from jaxquant.transforms.quantized import under

Where = Callable[[str, Array], bool]


def qat(
    fn: Callable,
    weights: Format | Quantizer = int8,
    *,
    activations: Format | None = int8,
    outliers: int = 0,
    where: Where | None = None,
    stats: Mapping[str, Stats] | None = None,
    when: Array | bool = True,
    gradients: Format | None = None,
    key: Key[Array, ""] | None = None,
) -> Callable:
    """Runs a function of float parameters as its quantized self, with the straight-through gradient.

        qat(fn, w)(params, x) = quantized(fn)(quantize_params(params, w), x)
        its gradient          = that of fn at the quantized weights and the unquantized activations,
                                where a weight is inside its clipping range, and 0 outside

    Weights, matmuls and look-ups are those that `quantize_params` and `quantized` would quantize, by the same code.
    Any optimizer trains it, under `jit` (do: it does not compile by itself), `grad`, `vmap`, `scan` and `remat`, with
    parameters in any float dtype and on any mesh. When done, serve `quantize_params(params, w)`.

    Args:
      fn: a pure function whose first argument is the parameters.
      weights: the format, or any quantizer: `rtn(int4, least_squares)` chooses ranges anew at every step,
        `stochastic(int4, key)` rounds at random, `at_bits(b)` has a traced width.
      activations, outliers: as in `quantized`.
      where, stats: as in `quantize_params`. Leaves that `learn_steps` or `learn_clips` made are always quantized.
      when: a traced bool for a schedule, `step >= 1000`: the float function runs where it is False.
      gradients: `int8` takes the backward matmuls in integers too, the incoming gradient rounded at random, where
        weights have symmetric integer codes and a scale per channel; others, and convolutions, stay in float.
      key: of that rounding; another one for every step.

    Returns:
      A function of the same arguments and results.

    Raises:
      NoMatchError, ShapeError, StatsError: as `quantize_params`.
      OptionError: `gradients` without a key, or of a format that is not of symmetric integers per channel.

    Source: Bengio et al., arXiv:1308.3432; Jacob et al., arXiv:1712.05877.
    """
    quantizer = as_quantizer(weights)
    run = under(fn, matmul.rules(activations, outliers, backward=_backward(gradients, key)))

    @functools.wraps(fn)
    def training(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        def on() -> Any:
            return run(_with_masters(params, quantizer, where, stats), *args, **kwargs)

        def off() -> Any:
            return fn(jax.tree.map(plain, params, is_leaf=is_learned), *args, **kwargs)

        return on() if when is True else jax.lax.cond(when, on, off)

    return training


def _backward(gradients: Format | None, key: Any) -> matmul.Backward | None:
    if gradients is None:
        return None
    if key is None:
        raise OptionError(f"qat(gradients={gradients}): give a key to round them at random, another for every step.")
    whole = isinstance(gradients, Format) and gradients.is_integer and gradients.group is None
    if not (whole and gradients.symmetric):
        raise OptionError(f"qat(gradients={gradients}): gradients are symmetric integers, such as jq.int8.")
    return matmul.Backward(gradients, key)


def learn_steps(
    params: PyTree,
    weights: Format | Quantizer = int8,
    *,
    where: Where | None = None,
    stats: Mapping[str, Stats] | None = None,
) -> PyTree:
    """Gives weights step sizes that train with them, beside them in the tree (LSQ, arXiv:1902.08153).

        dv/dscale = round(w / scale) - w / scale inside, qmin or qmax outside;   divided by sqrt(members * qmax)

    Args:
      params, where, stats: as in `quantize_params`.
      weights: the quantizer whose steps they start from; give `qat` and `quantize_params` its format.

    Returns:
      The tree with a `Stepped` in the place of each weight: `weight`, `scale`, and a `zero` that stays.
    """
    return _made(stepped, params, weights, where, stats)


def learn_clips(
    params: PyTree,
    weights: Format | Quantizer = int8,
    *,
    where: Where | None = None,
    stats: Mapping[str, Stats] | None = None,
) -> PyTree:
    """Gives weights a share of their range that trains with them: `scale = clip * max|w| / qmax`, `clip` from 1 on.

    Args and Returns are those of `learn_steps`, but the leaves are `Clipped`: `weight` and `clip`. As in PACT
    (arXiv:1805.06085), what lies beyond the range moves it and is not moved itself.
    """
    return _made(clipped, params, weights, where, stats)


def _made(make: Callable, params: PyTree, weights: Format | Quantizer, where: Where | None, stats: Any) -> PyTree:
    return _joined(make, quantize_params(params, weights, where=where, stats=stats), params)


def _joined(join: Callable, qparams: PyTree, params: PyTree) -> PyTree:
    """`join(leaf, q)` where a leaf became codes, and all other leaves as they were."""

    def one(q: Any, leaf: Any) -> Any:
        return join(leaf, q) if is_qtensor(q) and not is_qtensor(leaf) else leaf

    return jax.tree.map(one, qparams, params, is_leaf=is_qtensor)


def _with_masters(params: PyTree, quantizer: Quantizer, where: Where | None, stats: Any) -> PyTree:
    """The parameters in codes that gradients go straight through."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_learned)
    learned = {path_name(path) for path, leaf in leaves if is_learned(leaf)}
    chosen = lambda path, array: path in learned or (where or is_matrix)(path, array)  # noqa: E731
    still = jax.tree.map(_still, params, is_leaf=lambda leaf: is_qtensor(leaf) or is_learned(leaf))
    qparams = quantize_params(still, quantizer, where=chosen, stats=stats)
    return _joined(lambda leaf, q: trained(leaf, q, quantizer.format), qparams, params)


def _still(leaf: Any) -> Any:
    array = plain(leaf)
    return jax.lax.stop_gradient(array) if isinstance(array, jax.Array) else array
