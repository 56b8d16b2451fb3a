"""Control flow over tracked parameters: each rule is one call of JAX's own loop, branch or checkpoint.

A `Param` is a pytree, so it travels through `lax.scan` and friends as it is; the body of the new loop walks the body
of the old one. What leaves a body is decoded, with one exception: a parameter that a loop carries along unchanged (a
decoding loop that returns its weights) is held outside the loop, or the whole model would be decoded into the carry.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn

from jaxquant.trace import views


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["path", "memory"])
@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter on its way through the function: a bundle with `.shape` and `.dtype`, and the path it came from.

    `memory` is the permutation that brings it back to the order it lies in memory, where it was only transposed.
    """

    value: Any
    path: str
    memory: tuple[int, ...] | None = None

    def view(self, value) -> "Param":
        """The same parameter seen through a view."""
        return Param(value, self.path)

    def transposed(self, permutation: Sequence[int]) -> "Param":
        """The same parameter with its axes permuted."""
        place = {axis: new for new, axis in enumerate(permutation)}
        memory = tuple(place[axis] for axis in (self.memory or range(len(place))))
        return Param(views.transpose(self.value, permutation), self.path, memory)


@dataclasses.dataclass(frozen=True)
class Walker:
    """What a control-flow rule needs: how to walk an inner jaxpr, decode a parameter, and bind an equation as it is."""

    evaluate: Callable[[ClosedJaxpr, Sequence], list]
    decode: Callable[[Any, str], Any]
    bind: Callable[[JaxprEqn, Sequence], list]

    def body(self, jaxpr: ClosedJaxpr, inputs: Sequence, why: str) -> list:
        """Walks an inner jaxpr whose results have to be plain arrays."""
        return [self.decode(out, why) for out in self.evaluate(jaxpr, inputs)]


def inline(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> list:
    """`jit` and other calls: the inner function becomes part of the outer one, shardings kept as constraints."""
    jaxpr = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    inputs = _constrained(inputs, eqn.params.get("in_shardings"))
    return _constrained(walker.evaluate(jaxpr, inputs), eqn.params.get("out_shardings"))


def _constrained(values: Sequence, shardings: Sequence | None) -> list:
    def one(value, sharding):
        if isinstance(value, Param) or not isinstance(sharding, jax.sharding.Sharding):
            return value
        return jax.lax.with_sharding_constraint(value, sharding)

    return [one(*pair) for pair in zip(values, shardings, strict=True)] if shardings else list(values)


def checkpoint(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> list:
    """`jax.checkpoint`: rematerialised with the policy it had."""
    jaxpr = ClosedJaxpr(eqn.params["jaxpr"], ())
    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    body = jax.checkpoint(lambda *args: walker.body(jaxpr, args, "remat"), policy=policy, prevent_cse=prevent_cse)
    return body(*inputs)


def scan(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> list:
    """`lax.scan`: constants and stacked parameters stay parameters in the body, and so do carries that never change."""
    jaxpr, n_consts, n_carry = eqn.params["jaxpr"], eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, xs = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]
    invars, outvars = jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars
    held = _held(carry, invars[n_consts : n_consts + n_carry], outvars[:n_carry])
    stacks = [x.view(views.fill_leading(x.value, x.value.shape)) if isinstance(x, Param) else x for x in xs]

    def body(moving, slices):
        outs = walker.body(jaxpr, [*consts, *_merge(held, moving), *slices], "scan")
        return _moving(held, outs[:n_carry]), outs[n_carry:]

    start = _moving(
        held, [walker.decode(c, "scan carry") if h is None else c for c, h in zip(carry, held, strict=True)]
    )
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    last, stacked = jax.lax.scan(body, start, stacks, **options)
    unchanged = dict(zip(invars[n_consts + n_carry :], xs, strict=True))
    ys = [unchanged.get(v, y) if _is_var(v) else y for v, y in zip(outvars[n_carry:], stacked, strict=True)]
    return [*_merge(held, last), *ys]


def while_loop(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> list:
    """`lax.while_loop` and `fori_loop`: constants stay parameters, and so do carries that never change."""
    n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    test_consts, body_consts, carry = inputs[:n_test], inputs[n_test : n_test + n_body], inputs[n_test + n_body :]
    held = _held(carry, body.jaxpr.invars[n_body:], body.jaxpr.outvars)

    def proceed(moving):
        return walker.body(test, [*test_consts, *_merge(held, moving)], "while")[0]

    def step(moving):
        return _moving(held, walker.body(body, [*body_consts, *_merge(held, moving)], "while"))

    start = [walker.decode(c, "while carry") if h is None else c for c, h in zip(carry, held, strict=True)]
    return _merge(held, jax.lax.while_loop(proceed, step, _moving(held, start)))


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


def cond(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> list | None:
    """`lax.cond` and `lax.switch`; the branches of `platform_dependent` are left to JAX."""
    if eqn.params.get("branches_platforms") is not None:
        return None
    branches = [_branch(jaxpr, walker) for jaxpr in eqn.params["branches"]]
    return jax.lax.switch(inputs[0], branches, *inputs[1:])


def _branch(jaxpr: ClosedJaxpr, walker: Walker) -> Callable:
    return lambda *operands: walker.body(jaxpr, operands, "cond")


def custom_jvp(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> list:
    """A function with its own forward derivative: the primal is walked, the derivative is the user's, in floats."""
    arrays, call, plain = _custom(eqn, inputs, walker)
    walked = jax.custom_jvp(call)
    walked.defjvp(lambda primals, tangents: (call(*primals), jax.jvp(plain, primals, tangents)[1]))
    return walked(*arrays)


def custom_vjp(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> list:
    """A function with its own backward derivative, treated as `custom_jvp` treats a forward one."""
    arrays, call, plain = _custom(eqn, inputs, walker)
    walked = jax.custom_vjp(call)
    walked.defvjp(
        lambda *primals: (call(*primals), primals),
        lambda primals, cotangents: jax.vjp(plain, *primals)[1](cotangents),
    )
    return walked(*arrays)


def _custom(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> tuple[list, Callable, Callable]:
    """The plain inputs, the walked primal over them, and the equation as it is with its parameters decoded."""
    name = eqn.primitive.name
    arrays = [x for x in inputs if not isinstance(x, Param)]

    def fill(values, of_param):
        rest = iter(values)
        return [of_param(x) if isinstance(x, Param) else next(rest) for x in inputs]

    def call(*values):
        return walker.body(eqn.params["call_jaxpr"], fill(values, lambda param: param), name)

    def plain(*values):
        return walker.bind(eqn, fill(values, lambda param: walker.decode(param, f"derivative of {name}")))

    return arrays, call, plain


def shard_map(eqn: JaxprEqn, inputs: Sequence, walker: Walker) -> None:
    """`jax.shard_map`: the parameters are decoded outside, loudly, because a shard may cut through a group."""
    del eqn, walker
    paths = ", ".join(x.path for x in inputs if isinstance(x, Param))
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
