"""Loops over tracked parameters: `scan` and `while`, each one call of JAX's own loop over a body that is walked.

What leaves a body is decoded, with one exception: a parameter that a loop carries along unchanged (a decoding loop that
returns its weights) is held outside the loop, or the whole model would be decoded into the carry. Records are stacked
by a loop over stacked parameters, and merged over the turns of any other.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from jaxquant.trace import views
from jaxquant.trace.param import Param, as_they_lie
from jaxquant.trace.records import Records, merged, nothing
from jaxquant.trace.walker import Walker


def scan(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records]:
    """`lax.scan`: constants and stacked parameters stay parameters in the body, and so do carries that never change."""
    jaxpr, (n_consts, n_carry) = eqn.params["jaxpr"], _counts(eqn.params)
    consts, carry, xs = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]
    invars, outvars = jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars
    held = _held(carry, invars[n_consts : n_consts + n_carry], outvars[:n_carry])
    (laid, back), (kept, back_kept) = as_they_lie(consts), as_they_lie(held)
    stacks = [_stack(x, id(eqn)) if isinstance(x, Param) else x for x in xs]

    def body(moving, slices):
        slices = [_slice(*pair) if isinstance(pair[1], Param) else pair[0] for pair in zip(slices, xs, strict=True)]
        outs, records = walker.body(jaxpr, [*back(laid), *_merge(back_kept(kept), moving), *slices], "scan")
        return _moving(held, outs[:n_carry]), (outs[n_carry:], records)

    start = _moving(
        held, [walker.decode(c, "scan carry") if h is None else c for c, h in zip(carry, held, strict=True)]
    )
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    last, (stacked, records) = jax.lax.scan(body, start, stacks, **options)
    unchanged = dict(zip(invars[n_consts + n_carry :], xs, strict=True))
    ys = [unchanged.get(v, y) if _is_var(v) else y for v, y in zip(outvars[n_carry:], stacked, strict=True)]
    return [*_merge(held, last), *ys], {key: record.leave(id(eqn)) for key, record in records.items()}


def _counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants and carries a `scan` has; newer JAX describes all its inputs by one tree."""
    if "ft_in" not in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _stack(param: Param, loop: int) -> Param:
    """A stacked parameter as it lies, with the slices that a loop takes of it in all its parts."""
    param = param.laid if _lies_in_slices(param) else param
    value = views.fill_leading(param.value, param.value.shape)
    return dataclasses.replace(param.view(value, param.origin and param.origin.loop(loop)), index=None)


def _slice(taken: Param, stack: Param) -> Param:
    """A slice that a loop took, as the stack would have it: its axes, and the index that was taken before."""
    memory = [axis - 1 for axis in stack.memory[1:]] if stack.memory and _lies_in_slices(stack) else None
    return dataclasses.replace(taken.seen(memory), index=stack.index)


def _lies_in_slices(stack: Param) -> bool:
    """Whether a stack lies in memory slice after slice, each of them in an order of its own."""
    return stack.memory is None or stack.memory[0] == 0


def while_loop(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records]:
    """`lax.while_loop` and `fori_loop`: constants stay parameters, and so do carries that never change."""
    n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    test_consts, body_consts, carry = inputs[:n_test], inputs[n_test : n_test + n_body], inputs[n_test + n_body :]
    held = _held(carry, body.jaxpr.invars[n_body:], body.jaxpr.outvars)
    (laid, back), (kept, back_kept) = as_they_lie([*test_consts, *body_consts]), as_they_lie(held)

    def proceed(moving):
        (go,), records = walker.body(test, [*back(laid)[:n_test], *_merge(back_kept(kept), moving)], "while")
        return go, records

    def turn(moving):
        outs, records = walker.body(body, [*back(laid)[n_test:], *_merge(back_kept(kept), moving)], "while")
        return _moving(held, outs), records

    start = [walker.decode(c, "while carry") if h is None else c for c, h in zip(carry, held, strict=True)]
    run = _recorded_while if walker.recording else _plain_while
    last, records = run(proceed, turn, _moving(held, start))
    return _merge(held, last), records


def _plain_while(proceed: Callable, turn: Callable, start: Any) -> tuple[Any, Records]:
    return jax.lax.while_loop(lambda moving: proceed(moving)[0], lambda moving: turn(moving)[0], start), {}


def _recorded_while(proceed: Callable, turn: Callable, start: Any) -> tuple[Any, Records]:
    """The test is made at the end of each turn, where it can record what it met."""

    def step(state):
        _, moving, records = state
        moving, met = turn(moving)
        go, tested = proceed(moving)
        return go, moving, merged(merged(records, met), tested)

    go, tested = proceed(start)
    records = merged(tested, nothing(jax.eval_shape(turn, start)[1]))
    _, last, records = jax.lax.while_loop(lambda state: state[0], step, (go, start, records))
    return last, records


def _is_var(atom) -> bool:
    return not hasattr(atom, "val")


def _held(carry: Sequence, invars: Sequence, outvars: Sequence) -> list:
    """The parameters a loop carries along unchanged, None in the other places."""
    return [
        c if isinstance(c, Param) and out is var else None for c, var, out in zip(carry, invars, outvars, strict=True)
    ]


def _moving(held: Sequence, values: Sequence) -> list:
    """What the loop has to carry: None, an empty pytree, stands where a parameter is held outside."""
    return [value if h is None else None for h, value in zip(held, values, strict=True)]


def _merge(held: Sequence, moving: Sequence) -> list:
    return [m if h is None else h for h, m in zip(held, moving, strict=True)]
