"""Law 1 on the zoo: `quantized(fn)(qparams, x)` means `fn(dequantize(qparams), x)`, under every transformation.

With `activations=None` the two are equal to float tolerance, for every format. With int8 activations they differ by
what rounding costs: a token of K numbers whose largest is m is rounded in steps of m / 127, an error of
m / (127 sqrt(12)) for each of its numbers, which for a normal token (m < 4 rms) is 0.9 % of it. Errors of independent
matmuls add in squares and residual branches dilute them, so a chain of up to nine of them stays within 3 %.
"""

import functools
import math
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, jitted_as_shipped, quickly_jitted

import jaxquant as jq

# Groups of 8 divide every inner size of the zoo.
FORMATS = {"int8": jq.int8, "int4-affine": jq.int4(group=8, symmetric=False), "nf4": jq.nf4(group=8)}
FLOAT_TOLERANCE = 64 * np.finfo(np.float32).eps
ROUNDING = 0.03

INTEGER = "int8 x int8 -> int32"
MATMULS = ("dot_general", "conv_general_dilated", "ragged_dot_general")

every_model = pytest.mark.parametrize("name", MODELS)


def first(out):
    """A model's prediction, without the state that may come with it."""
    return jax.tree.leaves(out)[0]


@functools.cache
def split(name, format):
    """A model's quantized parameters as `(arrays, static)`; functions among the leaves are static."""
    return eqx.partition(eqx.filter_jit(jq.quantize_params)(MODELS[name]().params, FORMATS[format]), eqx.is_array)


@functools.cache
def decoded(name, format):
    """The arrays of the same parameters, decoded."""
    return quickly_jitted(jq.dequantize)(split(name, format)[0])


def over_floats(name):
    """The model over float arrays."""
    model = MODELS[name]()
    static = eqx.partition(model.params, eqx.is_array)[1]
    return lambda arrays, *args: model.fn(eqx.combine(arrays, static), *args)


def over_codes(name, format="int8", activations=jq.int8):
    """The model over QTensors."""
    fn, static = jq.quantized(MODELS[name]().fn, activations=activations), split(name, format)[1]
    return lambda arrays, *args: fn(eqx.combine(arrays, static), *args)


@functools.cache
def jitted_floats(name):
    """Compiled once: the float parameters have one structure, whatever format they were decoded from."""
    return jax.jit(over_floats(name))


def of_decoded(name, format, *args):
    """The right-hand side of the law."""
    return jitted_floats(name)(decoded(name, format), *args)


def errors(got, expected):
    """The relative error of every array of an output, QTensors decoded; integers and keys must be equal."""
    got, expected = jax.tree.leaves(jq.dequantize(got)), jax.tree.leaves(jq.dequantize(expected))
    assert [(a.shape, a.dtype) for a in got] == [(b.shape, b.dtype) for b in expected]
    pairs = list(zip(got, expected, strict=True))
    floats = [(a, b) for a, b in pairs if jnp.issubdtype(b.dtype, jnp.floating)]
    assert all(bool(jnp.all(a == b)) for a, b in pairs if not jnp.issubdtype(b.dtype, jnp.floating))
    assert all(np.isfinite(a).all() for a, _ in floats)
    return [float(np.linalg.norm(a - b)) / (float(np.linalg.norm(b)) or 1.0) for a, b in floats]


@every_model
@pytest.mark.parametrize("format", FORMATS)
def test_with_float_activations_the_two_are_equal(name, format):
    """Law 1, `activations=None`, jitted: equal to float tolerance, whatever the codes are."""
    args = MODELS[name]().args
    out = quickly_jitted(over_codes(name, format, None))(split(name, format)[0], *args)
    assert max(errors(out, of_decoded(name, format, *args))) < FLOAT_TOLERANCE


@every_model
def test_with_int8_activations_they_differ_by_rounding(name):
    """Law 1, W8A8, compiled as shipped: within the error of rounding activations, and not equal: some were rounded."""
    args = MODELS[name]().args
    out = jitted_as_shipped(over_codes(name))(split(name, "int8")[0], *args)
    expected = of_decoded(name, "int8", *args)
    assert max(errors(out, expected)) < ROUNDING
    assert errors(out, expected)[0] > FLOAT_TOLERANCE


def integer_matmuls(jaxpr):
    """Counts the equations that multiply int8 by int8 into int32 by their operands' shapes, inner jaxprs included."""
    found = Counter()
    for eqn in jaxpr.eqns:
        avals = [v.aval for v in eqn.invars[:2]]
        if eqn.primitive.name in MATMULS and all(a.dtype == jnp.int8 for a in avals):
            assert eqn.outvars[0].aval.dtype == jnp.int32
            found[tuple(math.prod(a.shape) for a in avals)] += 1
        for inner in inner_jaxprs(eqn):
            found += integer_matmuls(inner)
    return found


def inner_jaxprs(eqn):
    """The jaxprs of an equation; of branches by platform, which all compute one thing, the default alone."""
    branches = eqn.params.get("branches", ())
    if eqn.params.get("branches_platforms") is not None:
        branches = [b for b, p in zip(branches, eqn.params["branches_platforms"], strict=True) if p is None]
    others = [value for key, value in eqn.params.items() if key != "branches"]
    values = [getattr(value, "jaxpr", value) for value in (*branches, *others)]
    return [value for value in values if hasattr(value, "eqns")]


@every_model
def test_the_jaxpr_multiplies_integers_exactly_where_explain_promises(name):
    """Law: `int8 x int8 -> int32` stands in the jaxpr once for each row of `explain` that says so, and nowhere else."""
    model, (arrays, static) = MODELS[name](), split(name, "int8")
    jaxpr = jax.make_jaxpr(over_codes(name))(arrays, *model.args)
    rows = jq.explain(model.fn, eqx.combine(arrays, static), *model.args).meetings
    promised = [row for row in rows if row.arithmetic == INTEGER]
    assert integer_matmuls(jaxpr.jaxpr) == Counter(
        (math.prod(row.activations), math.prod(row.weight)) for row in promised
    )
    assert promised


@every_model
def test_every_quantized_parameter_is_met_in_codes(name):
    """Law: in the zoo no weight falls back to floating point: each row is integer arithmetic or a look-up."""
    model, (arrays, static) = MODELS[name](), split(name, "int8")
    params = eqx.combine(arrays, static)
    explanation = jq.explain(model.fn, params, *model.args)
    assert explanation.unmet == ()
    rows = [row for row in explanation.meetings if row.path]  # without those of activations with activations
    assert {row.arithmetic for row in rows} <= {INTEGER, "look-up"}
    leaves, _ = jax.tree.flatten(params, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor))
    assert len({row.path for row in rows}) == sum(isinstance(leaf, jq.QTensor) for leaf in leaves)


# JAX itself has no vmap of `ragged_dot` over the tokens.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "plain_ragged_moe"])
def test_vmap(name):
    """Law 1 under `vmap` over an input: each slice is what it is alone, with a scale for each of its tokens."""
    *others, x = MODELS[name]().args
    arrays, run = split(name, "int8")[0], over_codes(name)
    xs = jnp.stack([x, jnp.flip(x, -1) / 100])
    out = quickly_jitted(jax.vmap(lambda x: first(run(arrays, *others, x))))(xs)
    for x, slice in zip(xs, out, strict=True):
        assert max(errors(slice, first(of_decoded(name, "int8", *others, x)))) < ROUNDING


@every_model
def test_grad_with_respect_to_an_input(name):
    """Law 1 under `grad`: the gradient of the decoded model, straight through the rounding of activations."""
    *others, x = MODELS[name]().args
    arrays = split(name, "int8")[0]

    def gradient(run, params):
        return quickly_jitted(jax.grad(lambda x: jnp.sum(jnp.sin(first(run(params, *others, x))))))(x)

    expected = gradient(over_floats(name), decoded(name, "int8"))
    assert max(errors(gradient(over_codes(name, activations=None), arrays), expected)) < 4 * FLOAT_TOLERANCE
    assert max(errors(gradient(over_codes(name), arrays), expected)) < 2 * ROUNDING


@every_model
def test_export_round_trip(name):
    """Law: a quantized model that was exported, serialized and read again answers the same, bit for bit."""
    leaves, treedef = jax.tree.flatten((split(name, "int8")[0], MODELS[name]().args))
    run = over_codes(name)

    @jax.jit
    def flat(leaves):
        arrays, args = treedef.unflatten(leaves)
        return first(run(arrays, *args))

    read = jax.export.deserialize(jax.export.export(flat)(leaves).serialize())
    assert np.array_equal(quickly_jitted(read.call)(leaves), quickly_jitted(flat)(leaves))


def test_state_comes_back_as_it_went_in():
    """Law: parameters that a model returns unchanged are the QTensors that went in; its statistics are new floats."""
    model, params = MODELS["nnx_mlp"](), eqx.combine(*split("nnx_mlp", "int8"))
    _, statistics, returned = jq.quantized(model.fn)(params, *model.args)
    for layer in ("up", "down"):
        kernels = [state[layer]["kernel"].get_value() for state in (returned, params)]
        assert all(isinstance(kernel, jq.QTensor) for kernel in kernels)
        assert kernels[0].codes is kernels[1].codes and kernels[0].scale is kernels[1].scale
    assert not np.array_equal(statistics["norm"]["mean"].get_value(), params["norm"]["mean"].get_value())
