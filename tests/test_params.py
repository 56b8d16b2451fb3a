"""Trees: `quantize_params` finds the matrices of every framework and nothing else, and scales their outputs."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.params import Layout, _encode, layout

KEY = jax.random.key(0)


class LinenModel(nn.Module):
    """Something of everything: embedding, attention, norms, convolution, batch statistics, a stack of layers."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, 16)(tokens)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, 4, 16))
        x = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = nn.Conv(8, (3,))(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack()(x, None)[0]


class Layer(nn.Module):
    """One layer of the stack."""

    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8)(nn.LayerNorm()(x)), None


@functools.cache
def linen_variables():
    """The model's parameters and statistics."""
    return jax.jit(LinenModel().init)(KEY, jnp.zeros((1, 4), jnp.int32))


def scales(tree) -> dict[str, tuple[int, ...]]:
    """The shape of each quantized parameter's scale, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.scale.shape
        for path, leaf in leaves
        if isinstance(leaf, jq.QTensor)
    }


def test_linen():
    variables = linen_variables()
    attention = "params/MultiHeadDotProductAttention_0"
    assert scales(jq.quantize_params(variables)) == {
        "params/Embed_0/embedding": (32, 1),
        f"{attention}/query/kernel": (1, 2, 8),
        f"{attention}/key/kernel": (1, 2, 8),
        f"{attention}/value/kernel": (1, 2, 8),
        f"{attention}/out/kernel": (1, 1, 16),
        "params/Conv_0/kernel": (1, 1, 8),
        "params/ScanLayer_0/Dense_0/kernel": (3, 1, 8),
    }


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(32, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs), nnx.Conv(16, 8, (3, 3), rngs=rngs)])

    _, state = nnx.split(Model(nnx.Rngs(0)))
    quantized = jq.quantize_params(state)
    assert isinstance(quantized, nnx.State)
    assert scales(quantized) == {
        "embed/embedding/value": (32, 1),
        "attention/query/kernel/value": (1, 2, 8),
        "attention/key/kernel/value": (1, 2, 8),
        "attention/value/kernel/value": (1, 2, 8),
        "attention/out/kernel/value": (1, 1, 16),
        "layers/0/kernel/value": (1, 16),
        "layers/1/kernel/value": (1, 1, 1, 8),
    }


def test_equinox():
    keys = jax.random.split(KEY, 4)
    model = {
        "linear": eqx.nn.Linear(8, 4, key=keys[0]),
        "conv": eqx.nn.Conv2d(3, 5, 3, key=keys[1]),
        "embedding": eqx.nn.Embedding(32, 8, key=keys[2]),
        "cell": eqx.nn.GRUCell(8, 4, key=keys[3]),
        "norm": eqx.nn.LayerNorm((4, 4)),
        "activation": jax.nn.relu,
    }
    assert scales(jq.quantize_params(model)) == {
        "linear/weight": (4, 1),
        "conv/weight": (5, 1, 1, 1),
        "embedding/weight": (32, 1),
        "cell/weight_ih": (12, 1),
        "cell/weight_hh": (12, 1),
    }


def test_haiku():
    def forward(x):
        return hk.Linear(4)(hk.LayerNorm(-1, True, True)(hk.Conv2D(5, 3)(hk.Embed(32, 8)(x))))

    params = jax.jit(hk.transform(forward).init)(KEY, jnp.zeros((1, 6, 6), jnp.int32))
    assert scales(jq.quantize_params(params)) == {
        "embed/embeddings": (32, 1),
        "conv2_d/w": (1, 1, 1, 5),
        "linear/w": (1, 4),
    }


def test_plain_trees_and_stacks_of_experts():
    params = [
        {"w1": jnp.ones((4, 6)), "b1": jnp.ones((3, 6)), "experts": jnp.ones((3, 4, 6)), "ln_1": jnp.ones((3, 4))}
    ]
    assert scales(jq.quantize_params(params)) == {"0/w1": (1, 6), "0/experts": (3, 1, 6)}


def test_boxes_keep_their_metadata():
    model = nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    variables = model.init(KEY, jnp.ones((1, 4)))
    box = jq.quantize_params(variables, where=lambda path, leaf: path == "params/kernel")["params"]["kernel"]
    assert isinstance(box, nn.Partitioned) and box.names == (None, "model")
    assert isinstance(box.value, jq.QTensor)


def test_everything_else_passes_untouched():
    variables = linen_variables() | {"key": KEY, "step": jnp.arange(6).reshape(2, 3)}
    before = jax.tree_util.tree_leaves_with_path(variables)
    after = dict(jax.tree_util.tree_leaves_with_path(jq.quantize_params(variables), is_leaf=lambda x: x is None))
    kept = [path for path, leaf in before if after.get(path) is leaf]
    assert len(kept) == len(before) - 7


@pytest.mark.parametrize(
    "format", [jq.int8, jq.int4(symmetric=False), jq.nf4(group=4), jq.int8(per_channel=False)], ids=str
)
def test_dequantize_is_the_inverse(format):
    """Of the tree's structure, shapes and dtypes exactly; of its values within a code's width."""
    params = {"dense": {"kernel": jax.random.normal(KEY, (8, 4), jnp.bfloat16), "bias": jnp.ones(4)}}
    back = jq.dequantize(jq.quantize_params(params, format))
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, params)
    assert back["dense"]["kernel"].dtype == jnp.bfloat16 and back["dense"]["bias"] is params["dense"]["bias"]
    largest = jnp.abs(params["dense"]["kernel"]).max()
    assert jnp.abs(back["dense"]["kernel"] - params["dense"]["kernel"]).max() <= 0.3 * largest


def test_a_stack_is_quantized_matrix_by_matrix():
    stack = jax.random.normal(KEY, (3, 8, 4)) * jnp.array([1.0, 10.0, 100.0])[:, None, None]
    for format in (jq.int8, jq.int4(group=4), jq.int8(per_channel=False)):
        whole = jq.quantize_params({"w": stack}, format)["w"]
        for i in range(3):
            one = jq.quantize(stack[i], format)
            jax.tree.map(np.testing.assert_array_equal, whole[i], one)


def test_where_chooses():
    params = {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "b": {"kernel": jnp.ones((4, 4))}}
    seen = []
    result = jq.quantize_params(params, where=lambda path, leaf: seen.append((path, leaf.ndim)) or path == "b/kernel")
    assert seen == [("a/bias", 1), ("a/kernel", 2), ("b/kernel", 2)]
    assert result["a"] is not params["b"] and isinstance(result["b"]["kernel"], jq.QTensor)
    assert result["a"]["kernel"] is params["a"]["kernel"]


def test_donated_leaves_are_released_and_kept_ones_are_not():
    params = {"kernel": jax.random.normal(KEY, (8, 4)), "bias": jnp.ones(4)}
    kernel = params["kernel"]
    expected = jq.quantize(kernel)
    result = jq.quantize_params(params, donate=True)
    assert kernel.is_deleted() and not params["bias"].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, result["kernel"], expected)


def test_a_donated_leaf_that_is_kept_elsewhere_lives():
    shared = jnp.ones((4, 4))
    result = jq.quantize_params(
        {"kernel": shared, "other": shared}, donate=True, where=lambda path, leaf: path == "kernel"
    )
    assert not shared.is_deleted() and result["other"] is shared


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("format", [jq.int8, jq.int4(group=64, symmetric=False), jq.nf4, jq.fp8], ids=str)
def test_quantizing_a_leaf_needs_no_more_than_a_leaf_beside_it(format, dtype):
    leaf = jax.ShapeDtypeStruct((1024, 1024), dtype)
    memory = _encode.lower(leaf, format, Layout(2, (-2,))).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= memory.argument_size_in_bytes


def test_works_on_shapes_alone():
    params = {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    shapes = jax.eval_shape(jq.quantize_params, params)
    assert shapes["kernel"].shape == (8, 4) and shapes["kernel"].scale.shape == (1, 4)


def test_attention_names_do_not_catch_other_layers():
    assert layout("block/out/kernel", 3, {"block/out/kernel"}) == Layout(2, (-2,))
    assert layout("block/out/kernel", 3, {"block/out/kernel", "block/query/kernel"}) == Layout(3, (-3, -2))
    assert layout("blocks/query/kernel", 4) == Layout(3, (-3,))
