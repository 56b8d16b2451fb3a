"""A turned weight stands for what it was before: the same function gives the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, normal, quickly_jitted

import jaxquant as jq

SHAPES = {"matrix": (3, 32, 24), "row": (1, 32, 24), "rows": (70, 32, 24)}


def exactly(q):
    """The same codes with a scale that is a power of two, so that nothing is rounded."""
    return jq.QTensor(q.codes, jnp.exp2(jnp.round(jnp.log2(q.scale))), q.zero, q.dtype, q.bits)


@pytest.mark.parametrize("activations", [jq.int8, jq.int8(symmetric=False), None], ids=["int8", "affine", "float"])
@pytest.mark.parametrize("format", [jq.int8, jq.int8(symmetric=False)], ids=["int8", "int8-affine"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_turned_is_the_same_product(shape, format, activations):
    rows, inputs, outputs = shape
    q = {"w": exactly(jq.quantize(normal(inputs, outputs), format))}
    run = jax.jit(jq.quantized(lambda p, x: x @ p["w"], activations=activations))
    x = normal(rows, inputs, seed=1)
    turned = jq.turned(q)
    assert isinstance(turned["w"], jq.Turned) and turned["w"].stored.shape == (outputs, inputs)
    np.testing.assert_allclose(run(turned, x), run(q, x), rtol=1e-6, atol=1e-6)
    assert np.array_equal(jq.dequantize(turned["w"].upright), jq.dequantize(q["w"]))
    assert turned["w"].nbytes == q["w"].nbytes


@pytest.mark.parametrize("name", sorted(MODELS))
def test_turned_models_are_the_same_models(name):
    """Every model of the zoo: and in `explain`."""
    model = MODELS[name]()
    q = jq.quantize_params(model.params)
    run = jq.quantized(model.fn)
    turned = jq.turned(q)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    run = run if name.startswith("equinox") else quickly_jitted(run)  # whose trees hold functions
    found, expected = (jq.dequantize(run(tree, *model.args)) for tree in (turned, q))
    jax.tree.map(close, found, expected)

    def matmuls(tree):
        rows = jq.explain(model.fn, tree, *model.args).records
        return [(row["path"], row["arithmetic"]) for row in rows if row["activations"] and row["path"]]

    assert matmuls(turned) == matmuls(q)


def test_stacks_of_layers_are_turned_and_attention_is_left():
    """`[L, K, N]` with a scale for each layer is a stack; `[heads, width, out]` with one for all of them is not."""
    stack = jax.vmap(lambda w: jq.quantize(w, jq.int8))(normal(3, 16, 16))
    heads = jq.quantize(normal(3, 16, 16), jq.int8, axis=(0, 1))
    turned = jq.turned(
        {"stack": stack, "heads": heads, "int4": jq.quantize(normal(16, 16), jq.int4), "bias": jnp.ones(3)}
    )
    assert isinstance(turned["stack"], jq.Turned)
    assert all(not isinstance(turned[name], jq.Turned) for name in ("heads", "int4", "bias"))
    deep = jq.quantized(lambda q, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, q)[0])
    x = normal(2, 16, seed=1)
    np.testing.assert_allclose(deep(turned["stack"], x), deep(stack, x), rtol=1e-5, atol=1e-6)


def test_a_turned_weight_is_followed_through_transposes():
    """A tied head takes it the other way round."""
    q = jq.quantize(normal(24, 32), jq.int8)
    x = normal(3, 32, seed=1)
    run = jq.quantized(lambda w, x: x @ w.T, activations=None)
    np.testing.assert_allclose(run(jq.turned(q), x), run(q, x), rtol=1e-5, atol=1e-5)
