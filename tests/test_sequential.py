"""Sequential calibration: every weight sees the outputs of the quantized ones before it, for any function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, WIDTH, normal, weight
from tables import same

import jaxquant as jq
from jaxquant.errors import CalibrationError, NoMatchError, NotQuantizableError, UnseenError

G8 = jq.int4(group=8)
# What needs all of a weight's inputs at once: a gather of experts and a loop over time do not give them.
NOT_AT_ONCE = ("plain_picked_moe", "plain_lstm")


def chain(params, x):
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return x


PARAMS = {f"layer{i}": weight(WIDTH, WIDTH, seed=i) for i in range(3)}
XS = [normal(12, WIDTH, seed=i) for i in range(3)]


def test_it_is_the_loop_that_one_would_write_by_hand():
    """Calibrate one layer on the model whose earlier layers are quantized, quantize it, go on."""
    quantizer, done = jq.gptq(G8), dict(PARAMS)
    for name in PARAMS:
        stats = jq.calibrate(
            chain, jq.dequantize(done), [jnp.concatenate(XS)], where=lambda path, w, name=name: path == name
        )
        done |= jq.quantize_params({name: PARAMS[name]}, quantizer, stats=stats)
    found = jq.quantize_sequentially(chain, PARAMS, XS, quantizer)
    agreement = [np.mean(np.asarray(found[k].codes, np.int8) == np.asarray(done[k].codes, np.int8)) for k in PARAMS]
    # Gram matrices add up in another order, so that a code at a tie may differ.
    np.testing.assert_allclose(found["layer0"].scale, done["layer0"].scale, rtol=1e-5)
    assert min(agreement) > 0.98


def test_a_layer_makes_up_for_the_error_of_those_before_it():
    """With two bits in the first layer, the second is nearer to the float output when it saw that error."""
    params = {"l1": weight(WIDTH, 2 * WIDTH), "l2": weight(2 * WIDTH, WIDTH, seed=1)}
    x = normal(512, WIDTH, seed=7)
    run = lambda q: chain(jq.dequantize(q), x)  # noqa: E731
    quantizer = jq.gptq(jq.int2(group=8))
    at_once = jq.quantize_params(params, quantizer, stats=jq.calibrate(chain, params, [x]))
    behind = jq.quantize_sequentially(chain, params, [x], quantizer)
    assert same(at_once["l1"], behind["l1"]) and not same(at_once["l2"], behind["l2"])
    hidden = jnp.tanh(x @ jq.dequantize(behind["l1"]))
    error = lambda q: float(jnp.sum((hidden @ (params["l2"] - jq.dequantize(q["l2"]))) ** 2))  # noqa: E731
    assert error(behind) < error(at_once)
    assert run(behind).shape == x.shape


@pytest.mark.parametrize("name", ["linen_transformer", "linen_scan_remat", "nnx_vmap", "equinox_cnn", "plain_moe"])
def test_on_models(name):
    """All matmuls' weights become QTensors of their shapes: loops over stacks, kernels of rank 3, convolutions."""
    model, heard = MODELS[name](), []
    qparams = jq.quantize_sequentially(model.fn, model.params, [model.args] * 2, jq.rtn(G8), tell=heard.append)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in model.args)
    stats = jq.calibrate(model.fn, model.params, [shapes])
    assert set(heard) == set(stats)
    # Nearest rounding asks for no statistics, so the order does not matter.
    at_once = jq.quantize_params(model.params, jq.rtn(G8), stats=stats)
    leaves = [jax.tree.leaves(tree, is_leaf=lambda q: isinstance(q, jq.QTensor)) for tree in (qparams, at_once)]
    pairs = [pair for pair in zip(*leaves, strict=True) if isinstance(pair[1], jq.QTensor)]
    assert len(pairs) == len(stats) and all(same(*pair) for pair in pairs)


@pytest.mark.parametrize("name", NOT_AT_ONCE)
def test_a_weight_whose_inputs_come_in_turns_is_an_error(name):
    model = MODELS[name]()
    with pytest.raises(UnseenError, match="does not meet all of its inputs at once"):
        jq.quantize_sequentially(model.fn, model.params, [model.args], G8)


def test_a_stack_indexed_by_hand_is_quantized_element_by_element():
    stack = {"w": weight(3, WIDTH, WIDTH)}
    unrolled = lambda p, x: chain({i: p["w"][i] for i in range(3)}, x)  # noqa: E731
    scanned = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    quantizer = jq.rtn(G8, jq.least_squares)
    a, b = (jq.quantize_sequentially(f, stack, [XS[0]], quantizer)["w"] for f in (unrolled, scanned))
    assert a.shape == b.shape == (3, WIDTH, WIDTH)
    np.testing.assert_allclose(jq.dequantize(a), jq.dequantize(b), atol=0.02)


@pytest.mark.parametrize(("format", "axis"), [(jq.int8, 0), (jq.int4, 1)], ids=["int8", "int4, inputs last"])
def test_what_is_in_codes_already_is_used_decoded_and_stays(format, axis):
    """Law: the others are those beside the decoded weight, whether it is turned or not; to choose it is an error."""
    first, rest = ({k: v for k, v in PARAMS.items() if (k == "layer0") is one} for one in (True, False))
    first = {"layer0": jq.quantize(first["layer0"], format, axis=axis)}
    where = lambda path, leaf: path != "layer0"  # noqa: E731
    expected = jq.quantize_sequentially(chain, jq.dequantize(first) | rest, XS, jq.gptq(G8), where=where)
    for tree in (first, jq.turned(first)):
        found = jq.quantize_sequentially(chain, tree | rest, XS, jq.gptq(G8), where=where)
        assert type(found["layer0"]) is type(tree["layer0"])
        assert jax.tree.structure(found["layer0"]) == jax.tree.structure(tree["layer0"])
        assert same(*(jax.tree.leaves(one["layer0"]) for one in (found, tree)))
        assert all(same(found[path], expected[path]) for path in rest)
        with pytest.raises(NotQuantizableError, match=r"^layer0 is a QTensor"):
            jq.quantize_sequentially(chain, tree | rest, XS, G8)


def test_bad_batches_and_choices_are_errors():
    with pytest.raises(CalibrationError, match="no batch"):
        jq.quantize_sequentially(chain, PARAMS, [], G8)
    with pytest.raises(CalibrationError, match="alike"):
        jq.quantize_sequentially(chain, PARAMS, [XS[0], XS[1][:5]], G8)
    with pytest.raises(NoMatchError):
        jq.quantize_sequentially(chain, PARAMS, XS, G8, where=lambda *_: False)
    with pytest.raises(UnseenError, match="unused never met a matmul"):
        jq.quantize_sequentially(
            lambda p, x: x @ p["layer0"],
            {**PARAMS, "unused": PARAMS["layer1"]},
            XS,
            G8,
            where=lambda path, w: path in ("layer0", "unused"),
        )
