"""A matmul as a model has it: one of several in a program, each behind the one before it, by weights from memory.

A call of one matmul alone measures how a program is called, and finds the weight in the cache of the call before.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

# Matmuls of one program; and the bytes of float32 that all weights of a contender stand for: in codes of 8 bits they
# are a quarter, more than the last cache of a CPU holds.
LENGTH, COLD = 16, 2**28


class Contender(NamedTuple):
    """One way to multiply.

    Attributes:
      store: what is kept of a weight `[K, N]`, made once.
      multiply: activations `[M, K]`, as `take` gives them, and what is kept -> `[M, N]`.
      take: the activations from float32.
      compile: of a function of activations and a list of what is kept.
    """

    store: Callable[[jax.Array], Any]
    multiply: Callable[[Any, Any], Any]
    take: Callable[[jax.Array], Any] = lambda x: x
    compile: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.jit


def weights(inputs: int, outputs: int) -> list[list[jax.Array]]:
    """Weights for one program after the other, drawn from N(0, 1), of `COLD` bytes together at least."""
    count = max(2, -(-COLD // (4 * inputs * outputs)))
    length = min(LENGTH, count)
    keys = jax.random.split(jax.random.key(0), (-(-count // length), length))
    return [[jax.random.normal(key, (inputs, outputs)) for key in of_program] for of_program in keys]


def in_chains(contender: Contender, drawn: Sequence[Sequence[jax.Array]]) -> Callable[..., tuple[Any, Any]]:
    """A contender that has its weights.

    Args:
      contender: the contender.
      drawn: the weights of one program after the other.

    Returns:
      A function of float32 activations `[M, K]` to two calls: one that gives the results `[M, N]` of all matmuls of the
      first program, and one that runs another program's weights each time.
    """
    kept = [[contender.store(w) for w in of_program] for of_program in drawn]

    @contender.compile
    def program(first: Any, kept: Sequence[Any]) -> list[Any]:
        x, outs = first, []
        for one in kept:
            outs.append(contender.multiply(x, one))
            # Nothing is added, but only a NaN would tell: the next matmul waits for this one. To the first activations,
            # because a sum of ever more terms XLA would compute anew wherever it is read.
            x = first + 0 * outs[-1][:, :1]
        return outs

    def at(x: jax.Array) -> tuple[Any, Any]:
        taken, turns = contender.take(x), itertools.cycle(kept)
        return functools.partial(program, taken, kept[0]), lambda: program(taken, next(turns))

    return at
