"""A turned weight stands for what it was before: the same function gives the same numbers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FEW, MODELS, normal, quickly_jitted
from tables import exactly, same

import jaxquant as jq
from jaxquant.errors import AdapterError, NotQuantizableError
from jaxquant.matmul import choice

SHAPES = {"matrix": (3, 32, 24), "row": (1, 32, 24), "rows": (70, 32, 24)}
PACKED = {
    "int4": jq.int4,
    "int4-affine": jq.int4(symmetric=False),
    "int4-g16": jq.int4(group=16),
    "int4-g8-affine": jq.int4(group=8, symmetric=False),
    "int4-tensor": jq.int4(per_channel=False),
    "int3-g16": jq.int3(group=16),
    "int2-g8": jq.int2(group=8),
    "nf4": jq.nf4(group=16),
}
OF_BYTES = {
    "int8": jq.int8,
    "int8-affine": jq.int8(symmetric=False),
    "int8-g16": jq.int8(group=16),
    "e4m3": jq.fp8,
    "e5m2": jq.fp8(dtype=jnp.float8_e5m2),
}
# A product of codes of 8 bits, as StableHLO writes it.
BY_THE_LIBRARY = r"dot_general.*xi8>, .*xi8>\) -> .*xi32>"


@pytest.mark.parametrize("activations", [jq.int8, jq.int8(symmetric=False), None], ids=["int8", "affine", "float"])
@pytest.mark.parametrize("format", OF_BYTES.values(), ids=OF_BYTES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_turned_is_the_same_product(shape, format, activations):
    """Law: within float32, whatever the bytes stand for."""
    rows, inputs, outputs = shape
    q = {"w": exactly(jq.quantize(normal(inputs, outputs), format))}
    run = jax.jit(jq.quantized(lambda p, x: x @ p["w"], activations=activations))
    x = normal(rows, inputs, seed=1)
    turned = jq.turned(q)
    assert isinstance(turned["w"], jq.Turned) and turned["w"].stored.shape == (outputs, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(turned)} <= {jnp.dtype(jnp.int8), jnp.dtype(jnp.float32)}
    within = 1e-6 * np.abs(jq.dequantize(q["w"])).sum(axis=0, keepdims=True) + 1e-6
    assert np.all(np.abs(run(turned, x) - run(q, x)) <= within)
    assert np.array_equal(jq.dequantize(turned["w"].upright), jq.dequantize(q["w"]))
    assert turned["w"].nbytes == q["w"].nbytes and turned["w"].shape == q["w"].shape


@pytest.mark.parametrize("activations", [jq.int8, jq.int8(symmetric=False), None], ids=["int8", "affine", "float"])
@pytest.mark.parametrize("format", [jq.int8, jq.int8(symmetric=False)], ids=["int8", "int8-affine"])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_large_weight_is_read_by_the_library(rows, format, activations, monkeypatch):
    """Law: in codes or in three digits, it is the same product, and at a few rows one of whole numbers."""
    monkeypatch.setattr(choice, "_MANY", 0)
    monkeypatch.setattr(choice, "_LONG", 0)
    jax.clear_caches()
    q, x = exactly(jq.quantize(normal(64, 48), format)), normal(rows, 64, seed=1)
    forward = jax.jit(jq.quantized(lambda w, x: x @ w, activations=activations))
    found, text = forward(jq.turned(q), x), forward.lower(jq.turned(q), x).as_text()
    exact = np.asarray(x, np.float64) @ np.asarray(jq.dequantize(q), np.float64)
    expected = exact if activations is None else forward(q, x)
    assert np.all(np.abs(found - expected) <= 1e-5)
    assert bool(re.search(BY_THE_LIBRARY, text)) is (activations is not None or rows < 9)


def test_a_row_by_a_large_weight_in_short_lines_is_not(monkeypatch):
    """Law: its few inputs are added up in terms, and give the same product."""
    monkeypatch.setattr(choice, "_MANY", 0)
    jax.clear_caches()
    q, x = exactly(jq.quantize(normal(64, 48))), normal(1, 64, seed=1)
    forward = jax.jit(jq.quantized(lambda w, x: x @ w))
    assert not re.search(BY_THE_LIBRARY, forward.lower(jq.turned(q), x).as_text())
    assert np.all(np.abs(forward(jq.turned(q), x) - forward(q, x)) <= 1e-5)


@pytest.mark.parametrize("activations", [jq.int8(symmetric=False), None], ids=["int8", "float"])
@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize("format", PACKED.values(), ids=PACKED)
def test_packed_codes_are_turned_in_bytes(format, rows, activations):
    """Decoded whole or as lines, and in terms, they give the product of the upright one."""
    x = normal(rows, 32, seed=1)
    for outputs in (24, 768):
        q = exactly(jq.quantize(normal(32, outputs), format))
        turned = jq.turned(q)
        assert turned.stored.codes.held.dtype == jnp.int8 and turned.nbytes == q.nbytes and turned.shape == q.shape
        assert same(turned.upright, q) and same(jq.dequantize(turned), jq.dequantize(q))
        run = jax.jit(jq.quantized(lambda w, x: x @ w, activations=activations))
        np.testing.assert_allclose(run(turned, x), run(q, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"activations": None}, {}, {"activations": jq.int8(symmetric=False), "outliers": 1}],
    ids=["float", "int8", "affine-outlier"],
)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_bytes_of_a_packed_weight_are_never_taken_apart_in_memory(rows, options):
    """No array of codes, or of bytes packed anew, is in the compiled program, and of two rows no decoded weight."""
    turned, x = jq.turned(jq.quantize(normal(256, 1024), jq.int4(group=64))), normal(rows, 256)
    compiled = jax.jit(jq.quantized(lambda w, x: x @ w, **options)).lower(turned, x).compile()
    assert "s4[" not in compiled.as_text() and "u8[" not in compiled.as_text()
    assert rows > 2 or compiled.memory_analysis().temp_size_in_bytes < 4 * 256 * 1024 * 3 // 4


@pytest.mark.parametrize("format", [jq.fp8, jq.fp8(dtype=jnp.float8_e5m2)], ids=["e4m3", "e5m2"])
def test_every_float8_is_what_it_stands_for_in_a_row(format):
    """Law: a row with a single one has the numbers of all bytes that there are, and NaN where they are no numbers."""
    q = jq.quantize(normal(256, 256), format)
    codes = jax.lax.bitcast_convert_type(jnp.tile(jnp.arange(-128, 128).astype(jnp.int8), (256, 1)), q.codes.dtype)
    q = dataclasses.replace(q, codes=codes, scale=jnp.ones_like(q.scale))
    row = jnp.zeros((1, 256)).at[0, 77].set(1.0)
    found = jax.jit(jq.quantized(lambda w, x: x @ w))(jq.turned(q), row)[0]
    held = codes[77].astype(jnp.float32)
    np.testing.assert_array_equal(found, jnp.where(jnp.isfinite(held), held, jnp.nan))
    assert 0 < jnp.sum(jnp.isnan(found)) < 16


LOOPS = {
    "many turns": lambda stack, x: jax.lax.scan(lambda x, _: (layers(stack, x), None), x, length=4)[0],
    "while": lambda stack, x: jax.lax.while_loop(lambda x: x.max() > 0.5, lambda x: layers(stack, x) / 2, x),
    "branch": lambda stack, x: jax.lax.cond(x.sum() < 9, layers, lambda stack, x: x, stack, x),
    "carried": lambda stack, x: jax.lax.fori_loop(0, 4, lambda _, on: (on[0], layers(*on)), (stack, x))[1],
    "layers": lambda stack, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0],
}


def layers(stack, x):
    """All layers of a stack, one after the other."""
    return functools.reduce(lambda x, w: jnp.tanh(x @ w), stack, x)


@pytest.mark.parametrize("format", [jq.fp8, jq.int8], ids=["e4m3", "int8"])
@pytest.mark.parametrize("fn", LOOPS.values(), ids=LOOPS)
def test_turned_weights_enter_loops_and_branches_as_they_lie(fn, format):
    """Law: they give what upright ones do, and no copy of one of them is made."""
    stack, x = jax.vmap(lambda w: jq.quantize(w, format))(normal(4, 512, 512) / 23), normal(1, 512)
    stack = stack if fn is LOOPS["layers"] else [stack[index] for index in range(4)]
    run, turned = jax.jit(jq.quantized(fn)), jq.turned(stack)
    np.testing.assert_allclose(run(turned, x), run(stack, x), rtol=1e-4, atol=1e-4)
    assert run.lower(turned, x).compile().memory_analysis().temp_size_in_bytes < 512 * 512 * 3 // 5


def test_stacked_layers_of_float8_enter_their_loop_in_bytes():
    """Law: as they come, the loop gives what they give one by one, and no more than one of them is decoded."""
    stack, x = jax.vmap(lambda w: jq.quantize(w, jq.fp8))(normal(16, 256, 256) / 16), normal(1, 256)
    run = jax.jit(jq.quantized(LOOPS["layers"]))
    expected = jax.jit(jq.quantized(layers))([stack[index] for index in range(16)], x)
    np.testing.assert_allclose(run(stack, x), expected, rtol=1e-4, atol=1e-4)
    # A copy of the bytes of all, and one layer decoded, twice.
    assert run.lower(stack, x).compile().memory_analysis().temp_size_in_bytes < 256 * 256 * (16 + 9)


@pytest.mark.parametrize("format", [*OF_BYTES.values(), *PACKED.values()], ids=[*OF_BYTES, *PACKED])
def test_inputs_that_lie_last_stay_where_they_are(format):
    """Law: `[out, in]` and embeddings are not turned; packed codes are held as bytes, and the numbers are the same."""
    embedding = jq.quantize_params({"embedding": normal(48, 32)}, format)
    rows = {"embedding": jq.quantize(normal(48, 32), format, axis=1)}
    for q in (embedding, rows):
        turned, t = jq.turned(q), jnp.array([[5, 0, 47]])
        per_tensor = q["embedding"].scale.shape == (1, 1)
        assert isinstance(turned["embedding"], jq.Turned if per_tensor else jq.QTensor)
        fn = lambda p, t: p["embedding"][t] @ p["embedding"].T  # noqa: E731
        for activations in (jq.int8, None):
            run = jax.jit(jq.quantized(fn, activations=activations))
            np.testing.assert_allclose(run(turned, t), run(q, t), rtol=1e-5, atol=1e-5)
        assert same(jq.dequantize(turned), jq.dequantize(q)) and turned["embedding"].nbytes == q["embedding"].nbytes
        assert jax.tree.structure(jq.turned(turned)) == jax.tree.structure(turned)


@pytest.mark.parametrize("activations", [jq.int8, jq.int8(symmetric=False), None], ids=["int8", "affine", "float"])
@pytest.mark.parametrize(
    ("format", "most"), [(jq.int4(group=64), 4096 * 256 // 4), (jq.fp8, 4096 * 256 * 3 // 5)], ids=["int4", "e4m3"]
)
def test_the_bytes_of_a_tied_head_are_never_taken_apart_in_a_loop(format, most, activations):
    """Law: rows are looked up in the bytes that the head multiplies, and nothing of half their size is written.

    But of float8, whose sums in 8 terms are half its bytes.
    """
    q = jq.turned(jq.quantize_params({"embedding": normal(4096, 256)}, format))

    def step(p, token):
        return jnp.argmax(p["embedding"][token] @ p["embedding"].T, -1), token

    fn = jq.quantized(
        lambda p, token: jax.lax.scan(lambda t, _: step(p, t), token, length=4)[1], activations=activations
    )
    compiled = jax.jit(fn).lower(q, jnp.array([3])).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < most


@pytest.mark.parametrize("options", [{"activations": None}, {}, {"outliers": 1}], ids=["float", "int8", "outlier"])
def test_the_bytes_of_a_stack_are_never_taken_apart_in_its_loop(options):
    """No codes of one matrix of packed ones, and no bytes of it packed anew, are in the compiled program."""
    q, x = jq.quantize(normal(3, 96, 256), jq.int4(group=64), axis=2), normal(3, 1, 256)
    fn = jq.quantized(lambda w, x: jnp.einsum("bmk,bnk->bmn", x, w), **options)
    text = jax.jit(fn).lower(q, x).compile().as_text()
    assert not re.search(r"(s4|u8)\[(1,)?(96|256),", text)


@pytest.mark.parametrize("name", FEW)
def test_turned_models_are_the_same_models(name):
    """Models of every framework, and in `explain`."""
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
        {"stack": stack, "heads": heads, "odd": jq.quantize(normal(15, 16), jq.int4), "bias": jnp.ones(3)}
    )
    assert isinstance(turned["stack"], jq.Turned)
    assert all(not isinstance(turned[name], jq.Turned) for name in ("heads", "odd", "bias"))
    deep = jq.quantized(lambda q, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, q)[0])
    x = normal(2, 16, seed=1)
    np.testing.assert_allclose(deep(turned["stack"], x), deep(stack, x), rtol=1e-5, atol=1e-6)


def test_a_turned_weight_is_followed_through_transposes():
    """A tied head takes it the other way round."""
    q = jq.quantize(normal(24, 32), jq.int8)
    x = normal(3, 32, seed=1)
    run = jq.quantized(lambda w, x: x @ w.T, activations=None)
    np.testing.assert_allclose(run(jq.turned(q), x), run(q, x), rtol=1e-5, atol=1e-5)


def test_a_turned_weight_decodes_to_what_it_was():
    """`dequantize` is the inverse of `quantize_params`, however a weight is stored, beside an adapter too."""
    q = jq.quantize_params({"matrix": normal(32, 24), "stack": normal(2, 16, 8), "bias": jnp.ones(3)})
    expected = jq.dequantize(q)
    assert same(jq.dequantize(jq.turned(q)), expected)
    key, x = jax.random.key(0), normal(3, 32, seed=1)
    with_adapters = jq.turned(jq.add_lora(q, 2, key=key))
    assert same(jq.merge_lora(jq.dequantize(with_adapters)), expected)
    found, plain = (jq.quantized(lambda p, x: x @ p["matrix"])(tree, x) for tree in (with_adapters, q))
    np.testing.assert_allclose(found, plain, rtol=1e-6, atol=1e-6)
    with pytest.raises(AdapterError, match="matrix"):
        jq.merge_lora(with_adapters)


def test_an_adapter_stands_beside_the_upright_weight():
    """Law: `add_lora(turned(q))` is `add_lora(q)`, leaf by leaf, and what is not chosen stays turned."""
    q = jq.quantize_params({"one": normal(32, 24), "other": normal(32, 24, seed=1)})
    chosen = {"rank": 2, "key": jax.random.key(0), "where": lambda path, leaf: path == "one" and leaf.shape == (32, 24)}
    found, expected = (jq.add_lora(tree, **chosen) for tree in (jq.turned(q), q))
    assert same(*(jax.tree.leaves(tree["one"]) for tree in (found, expected)))
    assert isinstance(found["other"], jq.Turned)
    jq.add_lora(jq.turned(q), 2, key=jax.random.key(0))  # the default rule takes them too


SIDES = {"right": (-2, False), "right, transposed": (-1, False), "left": (-1, True), "left, transposed": (-2, True)}


@pytest.mark.parametrize(("contracted", "first"), SIDES.values(), ids=SIDES)
def test_dot_general_takes_a_turned_weight_on_either_side(contracted, first):
    """Of a batch of matrices, contracted along either axis: the product is that of the upright weight."""
    q = exactly(jax.vmap(lambda w: jq.quantize(w, jq.int8))(normal(2, 32, 24)))
    x, axes = normal(2, 5, q.shape[contracted], seed=1), ((3 + contracted,), (2,))
    numbers = ((axes if first else axes[::-1]), ((0,), (0,)))
    run = jax.jit(lambda q, x: jq.dot_general(*((q, x) if first else (x, q)), numbers))
    np.testing.assert_allclose(run(jq.turned(q), x), run(q, x), rtol=1e-5, atol=1e-5)


def test_what_is_turned_is_not_quantized_again():
    turned = jq.turned(jq.quantize_params({"a": {"w": normal(32, 24)}}))
    with pytest.raises(NotQuantizableError, match="a/w"):
        jq.quantize_params(turned)
    both = jq.quantize_params({**turned, "b": normal(32, 24)}, where=lambda path, leaf: path == "b")
    assert isinstance(both["b"], jq.QTensor) and both["a"]["w"].stored is turned["a"]["w"].stored


@pytest.mark.parametrize("precision", ["highest", None, "BF16_BF16_F32"])
def test_a_row_of_floats_keeps_every_bit_of_its_activations(precision):
    """Law: it is a float32 product at any precision, also where rounding is allowed."""
    q, x = jq.turned(jq.quantize(normal(512, 64), jq.int8)), normal(1, 512, seed=1)
    exact = np.asarray(x, np.float64) @ np.asarray(jq.dequantize(q), np.float64)
    found = jax.jit(jq.quantized(lambda w, x: jnp.dot(x, w, precision=precision), activations=None))(q, x)
    assert np.abs(found - exact).max() < 2.0**-20 * np.abs(exact).max()


@pytest.mark.parametrize("activations", [jq.int8, None], ids=["int8", "float"])
def test_sums_too_long_for_32_bits_and_no_rows_at_all(activations):
    """Law: the longest sums are those of the decoded numbers, and no rows give no rows."""
    q = jq.turned(jq.quantize(jnp.ones((2**18, 32)), jq.int8))
    run = jax.jit(jq.quantized(lambda w, x: x @ w, activations=activations))
    np.testing.assert_allclose(run(q, jnp.ones((1, 2**18))), 2.0**18, rtol=1e-5)
    assert run(q, jnp.ones((0, 2**18))).shape == (0, 32)
