"""Trees of QTensors in orbax checkpoints, which store them as the trees of arrays they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import jaxquant as jq
from jaxquant.sharding import shardings_like

checkpoint = pytest.importorskip("orbax.checkpoint")

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((64, 32)).astype(np.float32)
TOKENS = RNG.standard_normal((128, 64)).astype(np.float32)


def fn(params, x):
    return sum(x @ w for w in params.values())


def tree():
    """A weight in every kind of code, with every kind of part beside it."""
    params = {"w": WEIGHT}
    stats = jq.calibrate(fn, params, [TOKENS])
    quantizers = {
        "int8": jq.int8,
        "int4": jq.int4(group=16, symmetric=False),
        "int3": jq.int3(group=16),
        "int2": jq.int2(group=16),
        "nf4": jq.nf4(group=16),
        "fp8": jq.fp8,
        "awq": jq.awq(jq.int4(group=16)),
        "rotated": jq.rotated(jq.rtn(jq.int4(group=16))),
        "outliers": jq.outliers(jq.rtn(jq.int8), 16),
    }
    qparams = {name: jq.quantize_params(params, q, stats=stats)["w"] for name, q in quantizers.items()}
    qparams["double"] = jq.double_quantize(qparams["nf4"])
    qparams["turned"] = jq.turned(qparams["int8"])
    qparams["bfloat16"] = qparams["int8"].astype(jnp.bfloat16)
    return qparams | {"bias": jnp.ones(3, jnp.bfloat16)}


def test_round_trip(tmp_path):
    """Law: the same types, dtypes and bytes, and the same outputs; from a tree of shapes as from one of arrays."""
    qparams = tree()
    device = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(lambda: qparams),
        shardings_like(qparams, device),
    )
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "at", qparams)
        saver.wait_until_finished()
        again = saver.restore(tmp_path / "at", shapes)
    assert jax.tree.structure(again) == jax.tree.structure(qparams)  # widths, codebooks and dtypes are part of it
    for name, leaf in jax.tree_util.tree_flatten_with_path(qparams)[0]:
        read = dict(jax.tree_util.tree_flatten_with_path(again)[0])[name]
        assert read.dtype == leaf.dtype and np.array_equal(read, leaf), jax.tree_util.keystr(name)
    weights = [{k: v for k, v in tree.items() if k not in ("bias", "bfloat16")} for tree in (again, qparams)]
    assert np.array_equal(*(jax.jit(jq.quantized(fn))(w, TOKENS) for w in weights))
