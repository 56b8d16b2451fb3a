"""Stages a function as a jaxpr and evaluates it, parameters going to rules and everything else bound as it was.

    fn --stage--> jaxpr --walk(rules)--> outputs

For each equation: no parameter among its inputs, and it is bound untouched; control flow is walked; movement becomes a
view; a matmul, convolution or look-up goes to its rule; and anything else gets the decoded array. What comes out is
ordinary JAX, so `jit`, `grad`, `vmap`, `shard_map` and `export` compose outside.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from jaxquant.trace.control import CONTROL
from jaxquant.trace.movement import moved, result_of
from jaxquant.trace.param import Param
from jaxquant.trace.records import Place, Records, merged
from jaxquant.trace.walker import Walker


class Equation(NamedTuple):
    """What a rule is told of the operation: its parameters, the shape and dtype of its result, and where it is."""

    params: Mapping[str, Any]
    result: jax.ShapeDtypeStruct
    place: Place


Rule = Callable[[Sequence, Equation], Any]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What to do where parameters are met.

    Args:
      is_param: tells a parameter (a pytree that stands for one array) among the leaves of the arguments.
      decode: `(param, operation name) -> array`: the float array an operation without a rule gets.
      operations: by primitive name, `(inputs, equation) -> array`, with `Param`s among the inputs; None to decline,
        and the inputs are decoded; `Recorded` to remember something and leave the operation to the walker.
      untouched: hears the primitive's name and the inputs' shapes of every equation that meets no parameter.
      recording: whether operations answer with `Recorded`; such a walk is not differentiated.
    """

    is_param: Callable[[Any], bool]
    decode: Callable[[Param, str], jax.Array]
    operations: Mapping[str, Rule]
    untouched: Callable[[str, Sequence[Any]], None] | None = None
    recording: bool = False


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Records, which leave the walk by way of `record`, and what the operation is evaluated on.

    Args:
      records: by key.
      inputs: arrays in the place of the operation's inputs; None for those it had, decoded.
    """

    records: Records
    inputs: Sequence | None = None


@dataclasses.dataclass(frozen=True)
class Staged:
    """A function traced for certain arguments: its jaxpr, the inputs, and how to put the outputs together."""

    jaxpr: ClosedJaxpr
    inputs: list
    assemble: Callable[[Sequence], Any]


def transform(fn: Callable, rules: Rules) -> Callable:
    """The same function, evaluated under `rules`."""

    @functools.wraps(fn)
    def walked(*args, **kwargs):
        staged = stage(fn, rules, args, kwargs)
        return staged.assemble(walk(staged.jaxpr, staged.inputs, rules))

    return walked


def stage(fn: Callable, rules: Rules, args: tuple, kwargs: Mapping) -> Staged:
    """Traces `fn` with an array in the place of each parameter; what is no array is static, as in Equinox."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path((args, dict(kwargs)), is_leaf=rules.is_param)
    places = [i for i, (_, leaf) in enumerate(leaves) if rules.is_param(leaf) or _is_dynamic(leaf)]
    inputs = [Param.whole(leaf, argument_name(path)) if rules.is_param(leaf) else leaf for path, leaf in leaves]
    outcome = {}

    def flat(*arrays):
        values = [leaf for _, leaf in leaves]
        for place, array in zip(places, arrays, strict=True):
            values[place] = array
        call_args, call_kwargs = treedef.unflatten(values)
        outs, outcome["tree"] = jax.tree.flatten(fn(*call_args, **call_kwargs))
        outcome["static"] = [None if _is_result(out) else (out,) for out in outs]
        return [out for out in outs if _is_result(out)]

    jaxpr = jax.make_jaxpr(flat)(*[_aval(inputs[place]) for place in places])

    def assemble(outs):
        rest = iter(out.value if isinstance(out, Param) else out for out in outs)
        return outcome["tree"].unflatten([next(rest) if s is None else s[0] for s in outcome["static"]])

    return Staged(jaxpr, [inputs[place] for place in places], assemble)


def _is_dynamic(leaf) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_result(leaf) -> bool:
    return _is_dynamic(leaf) or isinstance(leaf, int | float | complex)


def _aval(leaf):
    """What a parameter looks like to the function: an array of its shape and of the dtype it decodes to."""
    if not isinstance(leaf, Param):
        return leaf
    return jax.ShapeDtypeStruct(leaf.value.shape, leaf.value.dtype)


def argument_name(path: Sequence) -> str:
    """The name of a leaf of `(args, kwargs)`: its path inside its argument, or the argument's place for a bare one."""
    return path_name(path[2:] or path[1:])


def path_name(path: Sequence) -> str:
    """A leaf's path as `params/Dense_0/kernel`, without the box a framework keeps values in."""
    boxed = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(tuple(path[:-1] if boxed else path), simple=True, separator="/")


def walk(jaxpr: ClosedJaxpr, inputs: Sequence, rules: Rules) -> list:
    """Evaluates a jaxpr; a `Param` among the outputs is one that came back unchanged."""
    return record(jaxpr, inputs, rules)[0]


def record(jaxpr: ClosedJaxpr, inputs: Sequence, rules: Rules) -> tuple[list, Records]:
    """Evaluates a jaxpr, and hands out what its operations recorded, merged by key, with the results."""
    walker = Walker(
        evaluate_at=lambda place, inner, args: _evaluate(inner, args, rules, dataclasses.replace(walker, place=place)),
        decode=lambda value, why: rules.decode(value, why) if isinstance(value, Param) else value,
        bind=_bind_one,
        recording=rules.recording,
    )
    given = {id(x) for x in inputs if isinstance(x, Param)}
    outs, records = walker.evaluate(jaxpr, inputs)
    return [out if id(out) in given else walker.decode(out, "return") for out in outs], records


def _evaluate(jaxpr: ClosedJaxpr, inputs: Sequence, rules: Rules, walker: Walker) -> tuple[list, Records]:
    consts = [jax.numpy.asarray(c) if isinstance(c, np.ndarray) else c for c in jaxpr.consts]
    env = dict(zip([*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars], [*consts, *inputs], strict=True))

    # Values are dropped after their last use, or a walk over arrays would hold every activation there ever was.
    last = _last_uses(jaxpr.jaxpr)
    untouched: list[JaxprEqn] = []
    records: Records = {}
    for number, eqn in enumerate(jaxpr.jaxpr.eqns):
        if any(isinstance(env.get(atom), Param) for atom in eqn.invars if not isinstance(atom, Literal)):
            env.update(_bind(untouched, env, lambda var, now=number: last.get(var, -1) >= now))
            untouched = []
            here = dataclasses.replace(walker, place=walker.place.equation(number))
            outs, more = _meet(eqn, [_read(env, atom) for atom in eqn.invars], rules, here)
            env.update(zip(eqn.outvars, outs, strict=True))
            env = {var: value for var, value in env.items() if last.get(var, -1) > number}
            records = merged(records, more)
        else:
            untouched.append(eqn)
            _hear(eqn, rules)
    if jaxpr.jaxpr.outvars or not walker.recording:  # who only listens needs nothing after the last meeting
        env.update(_bind(untouched, env, lambda var: var in last))
    return [_read(env, atom) for atom in jaxpr.jaxpr.outvars], records


def _last_uses(jaxpr: Jaxpr) -> dict[Any, int]:
    """The number of the last equation that reads each variable; results are read after all of them."""
    reads = [*((i, atom) for i, eqn in enumerate(jaxpr.eqns) for atom in eqn.invars)]
    reads += [(len(jaxpr.eqns), atom) for atom in jaxpr.outvars]
    return {atom: i for i, atom in reads if not isinstance(atom, Literal)}


def _meet(eqn: JaxprEqn, inputs: Sequence, rules: Rules, walker: Walker) -> tuple[list, Records]:
    """An equation with a parameter among its inputs."""
    records: Records = {}
    name, scope = eqn.primitive.name, str(eqn.source_info.name_stack)
    with jax.named_scope(scope) if scope else contextlib.nullcontext():
        if name in CONTROL:
            outs, records = CONTROL[name](eqn, inputs, walker) or (None, {})
        elif name in rules.operations:
            answer = rules.operations[name](inputs, Equation(eqn.params, result_of(eqn), walker.place))
            if isinstance(answer, Recorded):
                return _bind_one(eqn, answer.inputs or [walker.decode(x, name) for x in inputs]), answer.records
            outs = None if answer is None else [answer]
        else:
            outs = moved(eqn, inputs)
    return (_bind_one(eqn, [walker.decode(x, name) for x in inputs]) if outs is None else outs), records


def _hear(eqn: JaxprEqn, rules: Rules) -> None:
    """Tells who listens of an equation that met no parameter, and of those inside it."""
    if rules.untouched is None:
        return
    rules.untouched(eqn.primitive.name, [atom.aval for atom in eqn.invars])
    for inner in jaxprs_in_params(eqn.params):
        for inner_eqn in inner.eqns:
            _hear(inner_eqn, rules)


def _read(env: Mapping, atom):
    return atom.val if isinstance(atom, Literal) else env[atom]


def _bind_one(eqn: JaxprEqn, inputs: Sequence) -> list:
    """Evaluates one equation as it is, on other inputs than those it had."""
    env = {atom: x for atom, x in zip(eqn.invars, inputs, strict=True) if not isinstance(atom, Literal)}
    results = _bind([eqn], env, lambda var: True)
    return [results[var] for var in eqn.outvars]


def _bind(eqns: Sequence[JaxprEqn], env: Mapping, keep: Callable[[Any], bool]) -> dict:
    """Evaluates equations as they are, through the public evaluator, which keeps their contexts and name scopes."""
    made = dict.fromkeys(var for eqn in eqns for var in eqn.outvars)
    atoms = (atom for eqn in eqns for atom in eqn.invars if not isinstance(atom, Literal))
    needed = list(dict.fromkeys(atom for atom in atoms if atom not in made))
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    results = [var for var in made if keep(var)]
    jaxpr = Jaxpr((), needed, results, eqns, effects, DebugInfo("walk", "walk", None, None))
    return dict(zip(results, eval_jaxpr(jaxpr, (), *[env[var] for var in needed]), strict=True))
