"""LoRA: a tree with adapters means the tree they are merged into, on every model, over floats and over codes.

Meaning      quantized(fn)(tree, x) = fn(merge_lora(dequantize(tree)), x), to float tolerance
Nothing      a fresh adapter changes nothing: B = 0
Gradient     that of the merged function by A and B; the base has none, and its bytes stay
"""

import dataclasses
import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import FEW, MODELS, WIDTH, normal, quickly_jitted, weight
from tables import same

import jaxquant as jq
from jaxquant.adapter import Adapted, Adapter, is_leaf
from jaxquant.errors import AdapterError, NoMatchError, OptionError, StatsError

RANK = 3
BASES = {"float": None, "int8": jq.int8, "nf4": jq.nf4(group=8)}


def stirred(tree, size=0.3):
    """The tree with B drawn at random, as if it had been trained."""

    def one(leaf):
        if not isinstance(leaf, Adapted):
            return leaf
        b = size * normal(*leaf.adapter.b.shape, seed=7)
        return Adapted(leaf.base, dataclasses.replace(leaf.adapter, b=b))

    return jax.tree.map(one, tree, is_leaf=is_leaf)


def first(out):
    return np.asarray(jax.tree.leaves(jq.dequantize(out))[0], np.float64)


def close(a, b, tolerance=1e-4):
    assert np.max(np.abs(a - b)) <= tolerance * max(np.max(np.abs(b)), 1)


@pytest.mark.parametrize(
    ("name", "base"), [(name, base) for base in BASES for name in (MODELS if BASES[base] is None else FEW)]
)
def test_an_adapted_tree_means_the_merged_one(name, base):
    """The law on the zoo: thin matmuls where the walker sees one, the decoded sum everywhere else."""
    model = MODELS[name]()
    arrays, static = eqx.partition(model.params, eqx.is_array)

    def tree_of(arrays):
        params = eqx.combine(arrays, static)
        params = params if BASES[base] is None else jq.quantize_params(params, BASES[base])
        return stirred(jq.add_lora(params, RANK, key=jax.random.key(0), where=lambda path, leaf: leaf.ndim >= 2))

    @quickly_jitted
    def both(arrays, *args):
        tree = tree_of(arrays)
        adapted = jq.quantized(model.fn, activations=None)(tree, *args)
        merged = model.fn(jq.merge_lora(jq.dequantize(tree)), *args)
        return jax.tree.leaves(adapted)[0], jax.tree.leaves(merged)[0]

    close(*map(first, both(arrays, *model.args)))


PARAMS = {"w1": {"kernel": weight(WIDTH, 24)}, "w2": {"kernel": weight(24, 8, seed=1)}, "bias": normal(1, 8)}


def mlp(params, x):
    return jnp.tanh(x @ params["w1"]["kernel"]) @ params["w2"]["kernel"] + params["bias"]


def tree(format=None, **options):
    params = PARAMS if format is None else jq.quantize_params(PARAMS, format)
    return jq.add_lora(params, RANK, key=jax.random.key(0), **options)


@pytest.mark.parametrize("format", BASES.values(), ids=BASES)
def test_a_fresh_adapter_changes_nothing(format):
    x = normal(5, WIDTH)
    base = PARAMS if format is None else jq.quantize_params(PARAMS, format)
    assert same(jq.quantized(mlp)(tree(format), x), jq.quantized(mlp)(base, x))


def test_the_correction_is_never_multiplied_out():
    """No array as large as a weight is made on the way, forward or back: x @ A @ B, not x @ (A B)."""
    adapters, base = jq.split_lora(stirred(tree()))
    fn = lambda adapters, x: jnp.sum(jq.quantized(mlp)(jq.join_lora(adapters, base), x))  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(fn))(adapters, normal(5, WIDTH)))
    made = [line.split(" = ")[0] for line in program.splitlines() if " = " in line]
    assert made and not any(f"f32[{WIDTH},24]" in line or "f32[24,8]" in line for line in made)


@pytest.mark.parametrize("format", BASES.values(), ids=BASES)
def test_the_gradient_is_that_of_the_merged_function(format):
    x, c = normal(5, WIDTH), normal(5, 8, seed=4)
    adapters, base = jq.split_lora(stirred(tree(format)))

    def loss(adapters, run, ready):
        return jnp.sum(run(ready(jq.join_lora(adapters, base)), x) * c)

    got = jax.grad(loss)(adapters, jq.quantized(mlp, activations=None), lambda tree: tree)
    expected = jax.grad(loss)(adapters, mlp, lambda tree: jq.merge_lora(jq.dequantize(tree)))
    for path, adapter in expected.items():
        close(np.asarray(got[path].a), np.asarray(adapter.a))
        close(np.asarray(got[path].b), np.asarray(adapter.b))


def digest(tree):
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()


@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), jq.adamw8bit(1e-2, smallest=16)], ids=["adam", "adamw8bit"])
def test_training_moves_the_adapters_and_not_a_byte_of_the_base(optimizer):
    x, target = normal(64, WIDTH), normal(64, 8, seed=5)
    adapters, base = jq.split_lora(jq.double_quantize(tree(jq.nf4(group=8))))
    before = digest(base)
    loss = jax.jit(lambda a: jnp.mean((jq.quantized(mlp, activations=None)(jq.join_lora(a, base), x) - target) ** 2))

    @jax.jit
    def step(adapters, state):
        updates, state = optimizer.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    with jax.numpy_dtype_promotion("standard"):
        state, start = optimizer.init(adapters), loss(adapters)
        for _ in range(40):
            adapters, state = step(adapters, state)
    assert loss(adapters) < 0.8 * start and digest(base) == before


def test_split_and_join_are_inverse_and_adapters_are_named():
    whole = tree(jq.int8)
    adapters, base = jq.split_lora(whole)
    assert set(adapters) == {"w1/kernel", "w2/kernel"} and isinstance(adapters["w1/kernel"], Adapter)
    joined = jq.join_lora(adapters, base)
    assert jax.tree.structure(joined) == jax.tree.structure(whole)
    assert all(same(a, b) for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(whole), strict=True))


def test_what_cannot_be_is_an_error_that_says_what_to_do():
    with pytest.raises(AdapterError, match=r"w1/kernel is a QTensor.*jq.dequantize"):
        jq.merge_lora(tree(jq.int8))
    with pytest.raises(AdapterError, match="has an adapter already"):
        jq.add_lora(tree(), 2, key=jax.random.key(0), where=lambda *_: True)
    with pytest.raises(AdapterError, match="no leaf for the adapters of w1/kernel, w2/kernel"):
        jq.join_lora(jq.split_lora(tree())[0], {"other": normal(2, 2)})
    with pytest.raises(NoMatchError):
        tree(where=lambda *_: False)
    for rank in (0, -1):
        with pytest.raises(OptionError, match="positive whole number"):
            jq.add_lora(PARAMS, rank, key=jax.random.key(0))


@pytest.mark.parametrize("format", [jq.nf4(group=16), jq.int4(group=16), jq.int3(group=16, symmetric=False)])
def test_double_quantization_is_smaller_and_as_good(format):
    """Scales in 8 bits: an eighth of a bit for half a bit, each within half a step of its block's range."""
    w = {"w": weight(64, 512)}
    q = jq.quantize_params(w, format)
    twice = jq.double_quantize(q)
    inner = twice["w"].scale
    largest = np.asarray(q["w"].scale).reshape(4, 2, 256).max(-1)
    error = np.abs(np.asarray(jq.dequantize(inner)) - np.asarray(q["w"].scale)).reshape(4, 2, 256).max(-1)
    assert np.all(error <= 0.51 * largest / 255) and twice["w"].nbytes < q["w"].nbytes - 2.8 * q["w"].scale.size
    x = normal(3, 64)
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    settled = {"w": twice["w"].settled}
    for activations in (None, jq.int8):
        assert same(
            jq.quantized(fn, activations=activations)(twice, x), jq.quantized(fn, activations=activations)(settled, x)
        )
    assert same(jq.double_quantize(twice), twice)


def test_double_quantized_leaves_come_back_as_they_went_in():
    q = jq.double_quantize(jq.quantize_params({"w": weight(64, 512)}, jq.nf4(group=16)))
    out = jq.quantized(lambda params, x: (params, x @ params["w"]))(q, normal(3, 64))[0]
    assert out["w"] is q["w"]
    adapted = jq.add_lora({"w": weight(16, 8)}, 2, key=jax.random.key(0))
    assert jq.quantized(lambda params: params)(adapted)["w"] is adapted["w"]


def test_a_correction_has_the_precision_of_its_product():
    """Law: at the highest precision no product of a float base and its adapter is at a lower one."""
    fn = jq.quantized(lambda params, x: jnp.dot(x, params["w"], precision="highest"))
    adapted = jq.add_lora({"w": weight(16, 8)}, 2, key=jax.random.key(0))
    found = jax.make_jaxpr(fn)(adapted, normal(3, 16)).eqns
    dots = [eqn.params["precision"] for eqn in found if eqn.primitive.name == "dot_general"]
    assert dots == [(jax.lax.Precision.HIGHEST,) * 2] * 3


def test_explain_tells_of_adapters():
    found = jq.explain(mlp, stirred(tree(jq.int8)), normal(3, WIDTH))
    kinds = {meeting.path: meeting.arithmetic for meeting in found.meetings if meeting.operation == "dot_general"}
    assert kinds == {"w1/kernel": "int8 x int8 -> int32", "w2/kernel": "int8 x int8 -> int32"} and not found.unmet


def test_bases_are_quantized_under_their_adapters():
    """Adapters first or codes first gives one tree; and a float base trains through the rounding beside its adapter."""
    under = jq.quantize_params(tree(), jq.int4(group=8))
    assert same(under, tree(jq.int4(group=8)))
    x = normal(3, WIDTH)
    trained = jq.qat(mlp, jq.int4(group=8))
    close(first(trained(stirred(tree()), x)), first(jq.quantized(mlp)(stirred(under), x)))
    gradient = jax.grad(lambda tree: jnp.sum(trained(tree, x)))(stirred(tree()))["w1"]["kernel"]
    assert all(np.any(part != 0) for part in (gradient.base, gradient.adapter.a, gradient.adapter.b))


QUANTIZERS = {"float": None, "int8": jq.int8, "rotated": jq.rotated(jq.rtn(jq.int8))}


def equal(found, expected):
    """Statistics of the same weights, to the rounding of a matmul, in which a program's fusions may differ."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)


@pytest.mark.parametrize("turn", [lambda base: base, jq.turned], ids=["upright", "turned"])
@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_statistics_are_those_of_the_base_with_the_adapter_at_work(quantizer, turn):
    """Law: a fresh adapter changes none; after that, what is met first sees the same, what comes behind the merged."""
    x, base = normal(5, WIDTH), PARAMS if quantizer is None else jq.quantize_params(PARAMS, quantizer)
    adapters, _ = jq.split_lora(jq.add_lora(base, RANK, key=jax.random.key(0)))
    fresh = jq.join_lora(adapters, turn(base))
    expected = jq.calibrate(mlp, base, [x])
    equal(jq.calibrate(mlp, fresh, [x]), expected)
    merged = jq.merge_lora(jq.dequantize(stirred(fresh)))
    mixed = {"w1": merged["w1"], "w2": base["w2"], "bias": merged["bias"]}
    behind = jq.calibrate(mlp, mixed, [x])["w2/kernel"]
    assert not np.allclose(behind.absmax, expected["w2/kernel"].absmax, rtol=0.01)
    equal(jq.calibrate(mlp, stirred(fresh), [x]), {**expected, "w2/kernel": behind})


def test_only_bases_that_were_chosen_are_observed():
    """Law: `where` is asked of bases by the paths of the weights, never of what is beside them."""
    heard = {}
    where = lambda path, leaf: heard.update({path: leaf.shape}) or path.startswith("w2")  # noqa: E731
    assert set(jq.calibrate(mlp, tree(), [normal(5, WIDTH)], where=where)) == {"w2/kernel"}
    assert heard == {"w1/kernel": (WIDTH, 24), "w2/kernel": (24, 8), "bias": (1, 8)}


@pytest.mark.parametrize(
    "name", ["linen_transformer", "plain_scan", "equinox_cnn", "nnx_vmap", "plain_ragged_moe", "plain_moe"]
)
def test_every_kind_of_weight_is_observed_beside_its_adapter(name):
    """Law: stacks, attention, convolutions, experts that are sorted or picked, whatever `quantized` makes of them."""
    model = MODELS[name]()
    adapted = jq.add_lora(model.params, RANK, key=jax.random.key(0))
    expected = jq.calibrate(model.fn, model.params, [model.args])
    equal(jq.calibrate(model.fn, adapted, [model.args]), expected)


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_shapes_of_adapted_trees_give_zeros(quantizer):
    x, base = normal(5, WIDTH), PARAMS if quantizer is None else jq.quantize_params(PARAMS, quantizer)
    adapted = jq.add_lora(base, RANK, key=jax.random.key(0))
    shapes, batch = jax.eval_shape(lambda: (adapted, x))
    equal(jq.calibrate(mlp, shapes, [batch]), jax.tree.map(jnp.zeros_like, jq.calibrate(mlp, adapted, [x])))


def test_an_adapted_tree_is_served_with_fixed_ranges():
    """Law: a tree that is calibrated, fixed and run with its adapter gives `x @ base` in that range, and `x A B`."""
    x, fn = normal(5, WIDTH), lambda params, x: x @ params["w"]
    trained = stirred(jq.add_lora({"w": jq.quantize(weight(WIDTH, 24))}, RANK, key=jax.random.key(0)))
    fixed = jq.static(trained, jq.calibrate(fn, trained, [x], gram=False))
    base, adapter = fixed["w"].base, fixed["w"].adapter
    assert base.input_bound == jnp.max(jnp.abs(x)) and same([adapter], [trained["w"].adapter])
    expected = jq.quantized(fn)({"w": base}, x) + x @ adapter.product
    close(first(jq.quantized(fn)(fixed, x)), np.asarray(expected), 1e-5)


def test_a_bound_needs_statistics_and_a_sequence_bare_weights():
    with pytest.raises(StatsError, match=r"^static: w1/kernel has no statistics"):
        jq.static(tree(jq.int8), {})
    for format in (None, jq.int8):
        with pytest.raises(AdapterError, match=r"^w1/kernel has an adapter: .*split_lora"):
            jq.quantize_sequentially(mlp, tree(format), [normal(5, WIDTH)], jq.int8)
