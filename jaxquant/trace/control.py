"""Control flow over tracked parameters: each rule is one call of JAX's own loop, branch or checkpoint.

A `Param` is a pytree, so it travels through `lax.scan` and friends as it is; the body of the new loop walks the body
of the old one. What leaves a body is decoded, with one exception: a parameter that a loop carries along unchanged (a
decoding loop that returns its weights) is held outside the loop, or the whole model would be decoded into the carry.

What rules record inside a body comes out as ordinary results of it: stacked by a loop over stacked parameters, merged
over the turns of any other, and all zeros in the branches not taken.
"""

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn

from jaxquant.errors import UnseenError
from jaxquant.trace import views
from jaxquant.trace.param import Param
from jaxquant.trace.records import Records, merged, nothing


@dataclasses.dataclass(frozen=True)
class Walker:
    """What a control-flow rule needs: how to walk an inner jaxpr, decode a parameter, and bind an equation as it is.

    `recording` walks are never differentiated, so their rules need not keep a user's derivatives.
    """

    evaluate: Callable[[ClosedJaxpr, Sequence], tuple[list, Records]]
    decode: Callable[[Any, str], Any]
    bind: Callable[[JaxprEqn, Sequence], list]
    recording: bool = False

    def body(self, jaxpr: ClosedJaxpr, inputs: Sequence, why: str) -> tuple[list, Records]:
        """Walks an inner jaxpr whose results have to be plain arrays."""
        outs, records = self.evaluate(jaxpr, inputs)
        return [self.decode(out, why) for out in outs], records


def inline(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records]:
    """`jit` and other calls: the inner function becomes part of the outer one, shardings kept as constraints."""
    jaxpr = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    inputs = _constrained(inputs, eqn.params.get("in_shardings"))
    outs, records = walker.evaluate(jaxpr, inputs)
    return _constrained(outs, eqn.params.get("out_shardings")), records


def _constrained(values: Sequence, shardings: Sequence | None) -> list:
    def one(value, sharding):
        if isinstance(value, Param) or not isinstance(sharding, jax.sharding.Sharding):
            return value
        return jax.lax.with_sharding_constraint(value, sharding)

    return [one(*pair) for pair in zip(values, shardings, strict=True)] if shardings else list(values)


def checkpoint(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records]:
    """`jax.checkpoint`: rematerialised with the policy it had."""
    jaxpr = ClosedJaxpr(eqn.params["jaxpr"], ())
    if walker.recording:
        return walker.body(jaxpr, inputs, "remat")
    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    body = jax.checkpoint(lambda *args: walker.body(jaxpr, args, "remat"), policy=policy, prevent_cse=prevent_cse)
    return body(*inputs)


def scan(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records]:
    """`lax.scan`: constants and stacked parameters stay parameters in the body, and so do carries that never change."""
    jaxpr, n_consts, n_carry = eqn.params["jaxpr"], eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, xs = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]
    invars, outvars = jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars
    held = _held(carry, invars[n_consts : n_consts + n_carry], outvars[:n_carry])
    stacks = [_stack(x, id(eqn)) if isinstance(x, Param) else x for x in xs]

    def body(moving, slices):
        outs, records = walker.body(jaxpr, [*consts, *_merge(held, moving), *slices], "scan")
        return _moving(held, outs[:n_carry]), (outs[n_carry:], records)

    start = _moving(
        held, [walker.decode(c, "scan carry") if h is None else c for c, h in zip(carry, held, strict=True)]
    )
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    last, (stacked, records) = jax.lax.scan(body, start, stacks, **options)
    unchanged = dict(zip(invars[n_consts + n_carry :], xs, strict=True))
    ys = [unchanged.get(v, y) if _is_var(v) else y for v, y in zip(outvars[n_carry:], stacked, strict=True)]
    return [*_merge(held, last), *ys], {key: record.leave(id(eqn)) for key, record in records.items()}


def _stack(param: Param, loop: int) -> Param:
    """A stacked parameter, with the slices that a loop takes of it in all its parts."""
    value = views.fill_leading(param.value, param.value.shape)
    return param.view(value, param.origin and param.origin.loop(loop))


def while_loop(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records]:
    """`lax.while_loop` and `fori_loop`: constants stay parameters, and so do carries that never change."""
    n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    test_consts, body_consts, carry = inputs[:n_test], inputs[n_test : n_test + n_body], inputs[n_test + n_body :]
    held = _held(carry, body.jaxpr.invars[n_body:], body.jaxpr.outvars)

    def proceed(moving):
        return walker.body(test, [*test_consts, *_merge(held, moving[0])], "while")[0][0]

    def turn(moving):
        outs, records = walker.body(body, [*body_consts, *_merge(held, moving)], "while")
        return _moving(held, outs), records

    def step(moving):
        outs, records = turn(moving[0])
        return outs, merged(moving[1], records)

    start = [walker.decode(c, "while carry") if h is None else c for c, h in zip(carry, held, strict=True)]
    start = _moving(held, start)
    last, records = jax.lax.while_loop(proceed, step, (start, nothing(jax.eval_shape(turn, start)[1])))
    return _merge(held, last), records


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


def cond(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records] | None:
    """`lax.cond` and `lax.switch`; the branches of `platform_dependent` are left to JAX."""
    if eqn.params.get("branches_platforms") is not None:
        return None
    branches = [_branch(jaxpr, walker, {}) for jaxpr in eqn.params["branches"]]
    if walker.recording:
        seen = [nothing(jax.eval_shape(branch, *inputs[1:])[1]) for branch in branches]
        union = functools.reduce(operator.or_, seen)
        branches = [_branch(jaxpr, walker, union) for jaxpr in eqn.params["branches"]]
    return jax.lax.switch(inputs[0], branches, *inputs[1:])


def _branch(jaxpr: ClosedJaxpr, walker: Walker, nothing: Records) -> Callable:
    def branch(*operands):
        outs, records = walker.body(jaxpr, operands, "cond")
        return outs, nothing | records

    return branch


def custom_jvp(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records]:
    """A function with its own forward derivative: the primal is walked, the derivative is the user's, in floats."""
    if walker.recording:
        return walker.body(eqn.params["call_jaxpr"], inputs, eqn.primitive.name)
    arrays, call, plain = _custom(eqn, inputs, walker)
    walked = jax.custom_jvp(call)
    walked.defjvp(lambda primals, tangents: (call(*primals), jax.jvp(plain, primals, tangents)[1]))
    return walked(*arrays), {}


def custom_vjp(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records]:
    """A function with its own backward derivative, treated as `custom_jvp` treats a forward one."""
    if walker.recording:
        return walker.body(eqn.params["call_jaxpr"], inputs, eqn.primitive.name)
    arrays, call, plain = _custom(eqn, inputs, walker)
    walked = jax.custom_vjp(call)
    walked.defvjp(
        lambda *primals: (call(*primals), primals),
        lambda primals, cotangents: jax.vjp(plain, *primals)[1](cotangents),
    )
    return walked(*arrays), {}


def _custom(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Callable, Callable]:
    """The plain inputs, the walked primal over them, and the equation as it is with its parameters decoded."""
    name = eqn.primitive.name
    arrays = [x for x in inputs if not isinstance(x, Param)]

    def fill(values, of_param):
        rest = iter(values)
        return [of_param(x) if isinstance(x, Param) else next(rest) for x in inputs]

    def call(*values):
        return walker.body(eqn.params["call_jaxpr"], fill(values, lambda param: param), name)[0]

    def plain(*values):
        return walker.bind(eqn, fill(values, lambda param: walker.decode(param, f"derivative of {name}")))

    return arrays, call, plain


def shard_map(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> None:
    """`jax.shard_map`: the parameters are decoded outside, loudly, because a shard may cut through a group."""
    paths = ", ".join(x.path for x in inputs if isinstance(x, Param))
    if walker.recording:
        raise UnseenError(
            f"shard_map got {paths}: what happens to them inside it cannot be seen from outside. Calibrate a function "
            "without the shard_map, or leave them out with `where`."
        )
    warnings.warn(
        f"shard_map got the quantized parameters {paths}: they are decoded before it, so it runs in floating point. "
        "Call quantized(...) inside the shard_map, on the shards, to keep it quantized.",
        stacklevel=2,
    )


CONTROL = {
    "jit": inline,
    "pjit": inline,
    "closed_call": inline,
    "core_call": inline,
    "checkpoint": checkpoint,
    "remat": checkpoint,
    "remat2": checkpoint,
    "scan": scan,
    "while": while_loop,
    "cond": cond,
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "custom_vjp_call_jaxpr": custom_vjp,
    "shard_map": shard_map,
}
