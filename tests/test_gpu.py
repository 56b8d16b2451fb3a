"""What XLA makes of quantized programs for GPUs that are not there: memory, tensor cores, communication, and limits.

For activations [M, K] and a weight [K, N] of any format the temporaries are at most a quarter of the decoded weight
(bfloat16), an int32 copy of the output and an int8 copy of the activations, so no decoded weight is ever written; from
16 rows on the tensor cores multiply. Asserted are families of instructions and bounds, never counts.
"""

import functools
import importlib.util
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant.errors import CompileError, MissingPackageError, OptionError
from jaxquant.lowering import reading

missing = importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None
gpu = [pytest.mark.gpu, pytest.mark.skipif(missing, reason="pip install --no-deps -r examples/requirements-gpu.txt")]
on_gpu = lambda test: [mark(test) for mark in gpu][-1]  # noqa: E731

SIZE = 4096
DECODED = 2 * SIZE * SIZE  # bytes, in bfloat16
CASES = {
    "W8A8": (jq.int8, jq.int8, "s8"),
    "W8A16": (jq.int8, None, "bf16"),
    "W4A16": (jq.int4(group=128), None, "bf16"),
    "W4A16-affine": (jq.int4(group=128, symmetric=False), None, "bf16"),
    "W4A8": (jq.int4(group=128), jq.int8, "s8"),
    "W4A8-affine": (jq.int4(group=128, symmetric=False), jq.int8, "s8"),
    "W2A16": (jq.int2(group=64), None, "bf16"),
    "NF4": (jq.nf4, None, "bf16"),
    "fp8": (jq.fp8, None, "bf16"),
}
CARDS = [("h100", case) for case in CASES] + [
    (card, case) for card in ("a100", "rtx4090") for case in ("W8A8", "NF4", "fp8")
]


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def stored(format, *sizes):
    """A weight in codes, as shapes."""
    return jax.eval_shape(lambda w: jq.quantize(w, format), shape(*sizes))


# Functions of this module, which the compiling process imports: those of the tests carry their type checks along.
def product(q, x):
    return x @ q


def product_at(precision, q, x):
    return jnp.matmul(x, q, precision=precision)


def deep(stack, x):
    return jax.lax.scan(lambda x, q: (jnp.tanh(x @ q), None), x, stack)[0]


def serve(fn, activations, *args):
    return jq.quantized(fn, activations=activations)(*args)


def broken(x):
    raise ValueError("no such luck")


def twice_or_once(x, twice):
    return x * 2 if twice else x


def of_weight(program, size=SIZE * SIZE):
    """The results as large as the weight."""
    return [name for name, _ in program.buffers if np.prod([int(n) for n in re.findall(r"\d+(?=[,\]])", name)]) >= size]


@on_gpu
@pytest.mark.parametrize("rows", [1, 16, 512, 2048])
@pytest.mark.parametrize(("card", "case"), CARDS, ids=lambda name: name)
def test_a_weight_is_never_decoded(card, case, rows):
    format, activations, family = CASES[case]
    program = jq.lower_for(
        card, functools.partial(serve, product, activations), stored(format, SIZE, SIZE), shape(rows, SIZE)
    )
    assert program.temp_bytes <= DECODED // 4 + 4 * rows * SIZE + rows * SIZE
    assert rows >= SIZE or not of_weight(program)
    assert rows < 16 or any(family in name for name in program.tensor_cores), program.tensor_cores
    assert program.fits and not program.collectives


@on_gpu
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
    ("precision", "family"),
    [(None, "tf32"), ("TF32_TF32_F32", "tf32"), ("BF16_BF16_F32", "bf16"), ("highest", None)],
)
def test_a_float32_model_is_multiplied_at_its_precision(precision, family, devices):
    """The tensor cores have no float32, so the highest precision is without them."""
    forward = functools.partial(serve, functools.partial(product_at, precision), None)
    weight, x = shape(1024, 1024, dtype=jnp.float32), shape(64, 1024, dtype=jnp.float32)
    q, specs = jax.eval_shape(lambda w: jq.quantize(w, jq.int8), weight), (P(None, "model"), P())
    program = jq.lower_for("h100", forward, q, x, devices=devices, **({} if devices == 1 else {"specs": specs}))
    assert any(family in name for name in program.tensor_cores) if family else not program.tensor_cores


@on_gpu
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("case", CASES)
def test_a_stack_of_layers_is_read_where_it_lies(case, rows):
    """In a scan one row copies nothing, and more rows the codes of one layer: never the stack."""
    format, activations, _ = CASES[case]
    stack = stored(format, 8, SIZE, SIZE)
    program = jq.lower_for("h100", functools.partial(serve, deep, activations), stack, shape(rows, SIZE))
    layer = 0 if rows == 1 else stack.codes.size // 8 * stack.bits // 8
    assert program.temp_bytes <= layer + DECODED // 8


@on_gpu
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("cut", [P(None, "model"), P("model")], ids=["outputs", "inputs"])
@pytest.mark.parametrize("case", CASES)
def test_no_weight_is_gathered(case, cut, rows):
    """Tensor parallelism: nothing as large as a shard of the codes moves, and split inputs are added up.

    With the sums of a token goes the one that tells whether it is finite.
    """
    format, activations, _ = CASES[case]
    run, q, x = functools.partial(serve, product, activations), stored(format, SIZE, SIZE), shape(rows, SIZE)
    program = jq.lower_for("h100", run, q, x, devices=4, specs=(cut, P()))
    sizes = [np.prod([int(n) for n in re.findall(r"\d+(?=[,\]])", one.shape)]) for one in program.collectives]
    assert max(sizes, default=0) <= rows * (SIZE + 1)
    assert cut == P(None, "model") or any(
        re.match("all-reduce|reduce-scatter", one.kind) for one in program.collectives
    )
    assert program.argument_bytes <= q.nbytes / 4 + 8 * rows * SIZE + SIZE * 256


@on_gpu
@pytest.mark.parametrize("tokens", [1, 16])
def test_cards_share_out_the_heads_of_a_cache(tokens):
    """Tensor parallelism: attention to codes exchanges nothing, because each head is on one card."""
    cache = jax.eval_shape(lambda: jq.KVCache.empty(1, 256, 8, 128, jq.int8, jnp.bfloat16))
    queries, cut = shape(1, tokens, 32, 128), P(None, None, "model")
    run = lambda cache, queries: cache.attend(queries, 200)  # noqa: E731
    assert not jq.lower_for("h100", run, cache, queries, devices=4, specs=(cut, cut)).collectives


class Transformer(nn.Module):
    """Two layers of width 256."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(1024, 256)
        x = embed(tokens)
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(256)(nn.gelu(nn.Dense(1024)(nn.LayerNorm()(x))))
        return embed.attend(x)


MODEL, TOKENS = Transformer(), jax.ShapeDtypeStruct((4, 32), jnp.int32)


def init():
    return MODEL.init(jax.random.key(0), jnp.zeros(TOKENS.shape, jnp.int32))


OPTIMIZER = optax.sgd(1e-3)


def step(params, state, tokens, key):
    fn = jq.qat(MODEL.apply, jq.int8, gradients=jq.int8, key=key)
    value, gradient = jax.value_and_grad(lambda p: jnp.mean(fn(p, tokens) ** 2))(params)
    updates, state = OPTIMIZER.update(gradient, state)
    return value, optax.apply_updates(params, updates), state


@on_gpu
def test_explain_says_what_the_compiler_did():
    """Every parameter that meets a matmul says what multiplied it, and on which tensor cores."""
    qparams = jax.eval_shape(lambda: jq.quantize_params(init()))
    explained = jq.explain(MODEL.apply, qparams, TOKENS, target="h100")
    matmuls = [row for row in explained.records if row["path"] and row["operation"] == "dot_general"]
    assert len(matmuls) == 13
    assert all(re.search(r"Triton.*s32\.s8\.s8", row["compiled"]) for row in matmuls), matmuls
    assert "compiled" in str(explained).splitlines()[0]


@on_gpu
def test_training_multiplies_in_int8():
    """A step of `qat` with gradients in int8: its matmuls with weights are on the int8 tensor cores."""
    params = jax.eval_shape(init)
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jq.lower_for("h100", step, params, jax.eval_shape(OPTIMIZER.init, params), TOKENS, key, donate=(0, 1))
    assert any("s32.s8.s8" in name for name in program.tensor_cores)
    assert program.alias_bytes > 0


@on_gpu
def test_llama_70b_fits_where_it_should():
    """The seed's question: 140 GB of bfloat16 fit no card; int8 fits one of 80 GB, int4 42 GB, 2 bits an RTX 4090."""
    import llama70b

    def steps(weights, card):
        return [llama70b.compiled("70B", weights, tokens, card, 1) for tokens in (1, llama70b.CHUNK)]

    found = {"bf16": "h100", "int8": "h100", "int4 g128": "h100", "int2 g64": "rtx4090"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        programs = {weights: steps(weights, card) for weights, card in found.items()}
    assert not any(program.fits for program in programs["bf16"])
    assert all(program.fits for weights in list(found)[1:] for program in programs[weights])
    assert all(program.total_bytes < 42e9 for program in programs["int4 g128"])
    assert all(program.total_bytes < 24e9 for program in programs["int2 g64"])
    assert all(program.temp_bytes < 1e9 for every in programs.values() for program in every)


@on_gpu
def test_what_cannot_be_compiled_says_why():
    with pytest.raises(CompileError, match="no such luck"):
        jq.lower_for("h100", broken, shape(2))


@on_gpu
def test_arguments_that_are_no_arrays_are_static_and_donated_ones_are_reused():
    program = jq.lower_for("a100", twice_or_once, shape(1 << 20), True, donate=(0,))
    assert program.alias_bytes == program.output_bytes == 2 << 20
    assert "a100 x 1" in str(program) and "fits in 85.0 GB" in str(program)


def test_errors_name_the_fix(monkeypatch):
    with pytest.raises(OptionError, match="target='h200': it is one of h100, a100, rtx4090"):
        jq.lower_for("h200", jnp.sin, shape(2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install --no-deps jax-cuda12-pjrt"):
        jq.lower_for("h100", jnp.sin, shape(2))


HLO = """
%fused (p0: f32[8,16], p1: f32[16,4]) -> f32[8,4] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[16,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%p0, %p1), metadata={op_name="jit(f)/[a/b]/dot_general"}
}

ENTRY %main (x: f32[8,16], w: f32[16,4]) -> f32[8,4] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[16,4]{1,0} parameter(1)
  %gemm.1 = f32[8,4]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused, backend_config={"kind":"__triton_gemm"}
  %all-reduce = f32[8,4]{1,0} all-reduce(%gemm.1), to_apply=%add
  ROOT %c = f32[8,4]{1,0} custom-call(%all-reduce, %w), custom_call_target="__cublas$gemm", metadata={op_name="c"}
}
"""
PTX = """
.visible .entry gemm_1(
.param)
{ wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {r}; }
.entry other(
) { add }
"""


def test_reading_a_compiled_program():
    """Fusions take the scope of what they hold and the tensor cores of their kernel; results of fusions are buffers."""
    found, kernels = reading.computations(HLO), reading.tensor_cores([PTX])
    assert kernels["gemm_1"] == {"wgmma s32.s8.s8": 1}
    fusion, call = reading.multiplications(found, kernels)
    assert (fusion.scope, fusion.operands, fusion.tensor_cores) == (
        "jit(f)/[a/b]/dot_general",
        ("f32[8,16]", "f32[16,4]"),
        "wgmma s32.s8.s8",
    )
    assert (fusion.how, call.how, call.tensor_cores) == ("Triton fusion of XLA", "cuBLAS", "")
    assert reading.buffers(found) == [("f32[8,4]", 128)]
    (reduce,) = reading.collectives(found)
    assert (reduce.kind, reduce.shape, reduce.count) == ("all-reduce", "f32[8,4]", 1)
