"""Control flow over tracked parameters: each rule is one call of JAX's own branch, checkpoint or derivative.

A `Param` is a pytree, so it travels through them as it is; the body of the new equation walks the body of the old one,
and what leaves a body is decoded. What rules record inside comes out as ordinary results, all zeros in the branches
not taken. Loops are in a room of their own.
"""

import functools
import operator
import warnings
from collections.abc import Callable, Sequence

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn

from jaxquant.errors import UnseenError
from jaxquant.trace.loops import scan, while_loop
from jaxquant.trace.param import Param, as_they_lie
from jaxquant.trace.records import Records, nothing
from jaxquant.trace.walker import Walker


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
        return walker.part(jaxpr, inputs, "remat")
    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    body = jax.checkpoint(lambda *args: walker.body(jaxpr, args, "remat"), policy=policy, prevent_cse=prevent_cse)
    return body(*inputs)


def cond(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records] | None:
    """`lax.cond` and `lax.switch`; the branches of `platform_dependent` are left to JAX."""
    if eqn.params.get("branches_platforms") is not None:
        return None
    operands, back = as_they_lie(inputs[1:])

    def branches_of(nothing: Records) -> list[Callable]:
        return [_branch(jaxpr, walker, back, nothing) for jaxpr in eqn.params["branches"]]

    branches = branches_of({})
    if walker.recording:
        seen = [nothing(jax.eval_shape(branch, *operands)[1]) for branch in branches]
        branches = branches_of(functools.reduce(operator.or_, seen))
    return jax.lax.switch(inputs[0], branches, *operands)


def _branch(jaxpr: ClosedJaxpr, walker: Walker, back: Callable, nothing: Records) -> Callable:
    def branch(*operands):
        outs, records = walker.body(jaxpr, back(operands), "cond")
        return outs, nothing | records

    return branch


def custom_jvp(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records]:
    """A function with its own forward derivative: the primal is walked, the derivative is the user's, in floats."""
    if walker.recording:
        return walker.part(eqn.params["call_jaxpr"], inputs, eqn.primitive.name)
    call, plain = _custom(eqn, walker)
    walked = jax.custom_jvp(call)
    walked.defjvp(lambda primals, tangents: (call(*primals), jax.jvp(plain, primals, tangents)[1]))
    return walked(*inputs), {}


def custom_vjp(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Records]:
    """A function with its own backward derivative, treated as `custom_jvp` treats a forward one."""
    if walker.recording:
        return walker.part(eqn.params["call_jaxpr"], inputs, eqn.primitive.name)
    call, plain = _custom(eqn, walker)
    walked = jax.custom_vjp(call)
    walked.defvjp(
        lambda *primals: (call(*primals), primals),
        lambda primals, cotangents: jax.vjp(plain, *primals)[1](cotangents),
    )
    return walked(*inputs), {}


def _custom(eqn: JaxprEqn, walker: Walker) -> tuple[Callable, Callable]:
    """The walked primal, and the equation as it is with its parameters decoded.

    Parameters are arguments of both: in a closure, a master that is being differentiated would be out of JAX's sight.
    """
    name = eqn.primitive.name

    def call(*inputs):
        return walker.body(eqn.params["call_jaxpr"], inputs, name)[0]

    def plain(*inputs):
        return walker.bind(eqn, [walker.decode(x, f"derivative of {name}") for x in inputs])

    return call, plain


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
        "Call quantized(...) inside the shard_map, on the shards, with check_vma=False, to keep it quantized.",
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
