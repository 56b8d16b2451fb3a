"""Shardings of quantized parameters, read off shapes: no device is needed to say where an array goes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant.errors import NoMatchError, ShapeError
from jaxquant.sharding import shardings_like

MESH = AbstractMesh((4, 2), ("data", "model"))
PARAMS = {"up": jnp.ones((64, 256)), "bias": jnp.ones(256), "stack": jnp.ones((4, 64, 96))}


def on(*spec):
    return NamedSharding(MESH, P(*spec))


def specs(tree):
    """The spec of each array, filled up with None."""
    return jax.tree.map(lambda s: tuple(s.spec), tree)


def quantized(quantizer, **params):
    return jax.eval_shape(functools.partial(jq.quantize_params, quantizer=quantizer), params)


# The shape of the weight, its format, its spec, and those of scale and zero point.
FOLLOWS = [
    ((64, 256), jq.int8, (None, "model"), (None, "model")),
    ((64, 256), jq.int8, ("model", None), (None, None)),
    ((64, 256), jq.int8, ("model",), (None, None)),
    ((64, 256), jq.int8(per_channel=False), ("data", "model"), (None, None)),
    ((64, 256), jq.int4(group=16), ("data", "model"), ("data", "model")),
    ((64, 256), jq.int4(group=32), ("data", "model"), (None, "model")),
    ((64, 256), jq.int4(group=8, symmetric=False), (("data", "model"), None), (("data", "model"), None)),
    ((64, 256), jq.nf4(group=16), (None, ("data", "model")), (None, ("data", "model"))),
    ((4, 64, 96), jq.int4(group=32), ("data", "model", None), ("data", "model", None)),
    ((4, 64, 96), jq.fp8, ("data", "model", None), ("data", None, None)),
]


@pytest.mark.parametrize("shape, format, spec, part", FOLLOWS)
def test_parts_follow_codes_where_every_shard_has_as_much_of_them(shape, format, spec, part):
    """Law: codes have the weight's sharding; a scale has it along the axes where its length divides."""
    q = quantized(format, w=jnp.ones(shape))
    placed = shardings_like(q, {"w": on(*spec)})["w"]
    assert placed.codes.is_equivalent_to(on(*spec), len(shape))
    assert tuple(placed.scale.spec) == part and (placed.zero is None) == format.symmetric
    for array, sharding in zip(jax.tree.leaves(q["w"]), jax.tree.leaves(placed), strict=True):
        sharding.shard_shape(array.shape)  # an error where an axis does not divide


def test_what_stands_beside_codes():
    """Law: transforms, kept rows, adapters, scales in codes and turned weights follow as scales do."""
    w, x = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
    stats = jq.calibrate(lambda p, x: x @ p["w"], {"w": w}, [x])
    column, row = {"w": on(None, "model")}, {"w": on("model", None)}

    rotated = jq.quantize_params({"w": w}, jq.rotated(jq.rtn(jq.int8)))
    assert specs(shardings_like(rotated, row))["w"].transform[0].signs == ("model", None)
    assert specs(shardings_like(rotated, column))["w"].transform[0].signs == (None, None)
    split = jq.quantize_params({"w": w}, jq.outliers(jq.rtn(jq.int8), 8), stats=stats)
    kept = specs(shardings_like(split, row))["w"].kept
    assert kept.mask == ("model", None) and kept.rows == ("model", None)
    adapted = shardings_like(jq.add_lora(jq.quantize_params({"w": w}), 2, key=jax.random.key(0)), row)["w"]
    assert specs(adapted).adapter.a == (None, "model", None) and specs(adapted).adapter.b == (None, None, None)
    turned = specs(shardings_like(jq.turned(jq.quantize_params({"w": w})), column))["w"].stored
    assert turned.codes == ("model", None) and turned.scale == ("model", None)
    packed = specs(shardings_like(jq.turned(jq.quantize_params({"w": w}, jq.int4(group=16))), row))["w"].stored
    assert packed.codes.held == packed.scale == (None, "model")
    double = specs(shardings_like(jq.double_quantize(jq.quantize_params({"w": w}, jq.nf4(group=16))), column))["w"]
    assert double.scale.codes == (None, "model")


def test_one_sharding_for_a_subtree_and_shardings_without_names():
    """Law: a sharding that stands above parameters is for each of them."""
    q, device = quantized(jq.int8, layer=PARAMS), SingleDeviceSharding(jax.devices()[0])
    for given in (device, {"layer": device}):
        assert set(jax.tree.leaves(shardings_like(q, given))) == {device}
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings_like(q, on())))
    placed = jax.device_put(jq.quantize_params(PARAMS), shardings_like(jq.quantize_params(PARAMS), device))
    assert placed["up"].codes.sharding == device


WRONG = {
    "a parameter without a sharding": ({"up": on(), "stack": on()}, NoMatchError, "bias has no sharding"),
    "a sharding without a parameter": (dict.fromkeys([*PARAMS, "down"], on()), NoMatchError, "no parameter at down"),
    "something else": (dict.fromkeys(PARAMS, "model"), NoMatchError, "bias has 'model' for a sharding"),
    "too many axes": (
        dict.fromkeys(PARAMS, on(None, "model")),
        ShapeError,
        r"bias: .* 2 axes, and the shape is \(256,\)",
    ),
    "an axis that does not divide": (
        dict.fromkeys(PARAMS, on()) | {"stack": on(("data", "model"))},
        ShapeError,
        r"stack: axis 0 of \(4, 64, 96\) does not divide into the 8 shards",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_shardings_that_do_not_fit(case):
    """Law: the error names the parameter."""
    shardings, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        shardings_like(quantized(jq.int8, **PARAMS), shardings)
