"""A sharded tree of QTensors computes what it computes on one device, and no device gathers a weight.

Eight fake CPU devices, a mesh of data by model, tensor parallelism as one writes it for floats: `NamedSharding`s of the
weights, from which `shardings_like` derives those of their codes and scales. In a process of its own, because the
number of devices is fixed when JAX starts.
"""

import pytest
from processes import QUICK, found, started

pytestmark = pytest.mark.devices

PROGRAM = r"""
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jaxquant as jq
from jaxquant.errors import ShapeError
from jaxquant.sharding import shardings_like
from models import MODELS

facts = {"devices": jax.device_count()}
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def on(*spec, mesh=mesh):
    return NamedSharding(mesh, P(*spec))

def put(leaf, spec):
    return jax.device_put(leaf, shardings_like(leaf, on(*spec)))

def place(path, leaf):
    name = jax.tree_util.keystr(path)
    if leaf.ndim < 2:
        return on()
    if "embedding" in name:
        return on("model", None)
    if leaf.ndim == 3:
        return on("model", None, None) if "'out'" in name else on(None, "model", None)
    return on(None, "model") if leaf.shape[1] > leaf.shape[0] else on("model", None)

def same(a, b):
    return all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

def lies_like(q, shardings):
    pairs = zip(jax.tree.leaves(q), jax.tree.leaves(shardings_like(q, shardings)), strict=True)
    return all(array.sharding.is_equivalent_to(sharding, array.ndim) for array, sharding in pairs)

def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))

def is_q(leaf):
    return isinstance(leaf, jq.QTensor)

for name in ("linen_mlp", "linen_transformer"):
    model = MODELS[name]()
    args = [jnp.tile(a, (4,) + (1,) * (a.ndim - 1)) for a in model.args]
    shardings = jax.tree_util.tree_map_with_path(place, model.params)
    q = jq.quantize_params(model.params)
    sharded = jq.quantize_params(jax.device_put(model.params, shardings))
    facts[f"{name}-bytes"] = same(sharded, q) and lies_like(sharded, shardings)
    spread = [jax.device_put(a, on("data")) for a in args]
    for activations, key in ((jq.int8, "int8"), (None, "float")):
        run = jax.jit(jq.quantized(model.fn, activations=activations))
        facts[f"{name}-{key}"] = relative(run(sharded, *spread), run(q, *args))
    leaves = jax.tree.leaves(sharded, is_leaf=is_q)
    facts[f"{name}-split"] = all(not leaf.codes.sharding.is_fully_replicated for leaf in leaves if is_q(leaf))

# Weights larger than anything else: whatever is gathered, by its number of elements.
def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]

rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((8, 64)), jnp.float32)
params = {"up": rng.standard_normal((64, 256)), "down": rng.standard_normal((256, 64))}
params = jax.tree.map(lambda w: w.astype(np.float32), params)

def collectives(text, names="all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"):
    # What devices send each other: the dtype and the number of elements of every result.
    found = re.findall(rf"= ([^=]*?) (?:{names})(?:-start)?\(", text)
    parts = [part for result in found for part in re.findall(r"(\w+)\[([\d,]*)\]", result)]
    return [(dtype, int(np.prod([int(n) for n in shape.split(",") if n]))) for dtype, shape in parts]

def gathered(text):
    return max([n for _, n in collectives(text, "all-gather")], default=0)

# What the search finds where a weight is gathered.
whole = jax.jit(lambda w: w + 1, out_shardings=on())
facts["gathered-on-purpose"] = gathered(whole.lower(put(params["up"], (None, "model"))).compile().as_text())
FORMATS = {
    "channel": jq.int8,
    "group": jq.int4(group=16),
    "affine": jq.int8(symmetric=False),
    "fp8": jq.fp8,
    "nf4": jq.nf4(group=16),
}
for key, format in FORMATS.items():
    q = jq.quantize_params(params, format)
    shapes = jax.eval_shape(lambda params: jq.quantize_params(params, format), params)
    shardings = shardings_like(shapes, {"up": on(None, "model"), "down": on("model", None)})
    run = jax.jit(jq.quantized(mlp), in_shardings=(shardings, on("data")))
    text = run.lower(q, x).compile().as_text()
    facts[f"gathered-{key}"] = gathered(text)
    facts[f"sent-{key}"] = collectives(text)
    facts[f"mlp-{key}"] = relative(run(q, x), jax.jit(jq.quantized(mlp))(q, x))

# Writing a weight that is split along both axes in codes, on both kinds of mesh.
for kind in (AxisType.Auto, AxisType.Explicit):
    grid = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    shardings = {"up": on("data", "model", mesh=grid)}
    tile = jax.device_put({"up": params["up"]}, shardings)
    for key, format in FORMATS.items():
        q = jq.quantize_params(tile, format)
        facts[f"{kind.name}-{key}-bytes"] = same(q, jq.quantize_params({"up": params["up"]}, format))
        text = jax.jit(lambda w: jq.quantize(w, format)).lower(tile["up"]).compile().as_text()
        facts[f"{kind.name}-{key}-sent"] = max([n for _, n in collectives(text)], default=0)
        facts[f"{kind.name}-{key}-lies"] = lies_like(q, shardings)
    searched, expected = (jq.quantize_params(tree, jq.hqq(jq.int4(group=16))) for tree in (tile, {"up": params["up"]}))
    facts[f"{kind.name}-searched-lies"] = lies_like(searched, shardings)
    facts[f"{kind.name}-searched"] = relative(jq.dequantize(searched)["up"], jq.dequantize(expected)["up"])
    try:
        jq.quantize_params(tile, jq.int4(group=32))
    except ShapeError as error:
        facts[f"{kind.name}-cut"] = str(error)

# Column parallel on a mesh with explicit axes, which is what `jax.make_mesh` gives by default.
explicit = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
with jax.set_mesh(explicit):
    q = jq.quantize(params["up"])
    columns = jax.tree.map(lambda a: jax.device_put(a, P(None, "model")), q)
    out = jax.jit(jq.quantized(lambda w, x: x @ w))(columns, jax.device_put(x, P("data")))
    facts["explicit"] = relative(out, jax.jit(jq.quantized(lambda w, x: x @ w))(q, x))

# Statistics of a batch that is spread over the devices: of whole numbers, so that no order of a sum matters.
numbers = np.random.default_rng(1).integers(-3, 4, (64, 16)).astype(np.float32)
layers = {"w": np.random.default_rng(2).integers(-1, 2, (3, 16, 16)).astype(np.float32)}

def deep(params, x):
    return jax.lax.scan(lambda x, w: (jnp.clip(x @ w, -3, 3), None), x, params["w"])[0]

rows = on("data")
alone = jq.calibrate(deep, layers, [numbers, 2 * numbers])
spread = jq.calibrate(deep, layers, [jax.device_put(numbers, rows), jax.device_put(2 * numbers, rows)])
columns = {"w": jax.device_put(layers["w"], on(None, None, "model"))}
both = jq.calibrate(deep, columns, [jax.device_put(numbers, rows), 2 * numbers])
facts["counts"] = np.asarray(alone["w"].count).tolist()
for key, stats in (("data", spread), ("data-and-model", both)):
    facts[f"stats-{key}"] = same(alone, stats)

# The same on a mesh of explicit axes: known from the batch alone, or set around a function that says where sums go.
def pair(params, x, **out):
    return jnp.einsum("bi,io->bo", jnp.clip(x @ params["up"], -3, 3), params["down"], **out)

spread = [jax.device_put(n * numbers, on("data", mesh=explicit)) for n in (1, 2)]
facts["stats-explicit"] = same(alone, jq.calibrate(deep, layers, spread))

# Of a weight contracted along two axes, and of a convolution's.
def several(params, x):
    names = ("NWC", "WIO", "NWC")
    taps = jax.lax.conv_general_dilated(x[..., None], params["taps"], (1,), "SAME", dimension_numbers=names)
    return jnp.einsum("bhd,hdo->bo", x.reshape(-1, 4, 4), params["heads"]), taps

shapes = {"heads": (4, 4, 8), "taps": (3, 1, 2)}
ones = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
facts["stats-explicit-several"] = same(*(jq.calibrate(several, ones, x) for x in ([numbers, 2 * numbers], spread)))
two = {"up": layers["w"][0], "down": layers["w"][1]}
alone = jq.calibrate(pair, two, [numbers, 2 * numbers])
with jax.set_mesh(explicit):
    split = {"up": jax.device_put(two["up"], P(None, "model")), "down": jax.device_put(two["down"], P("model"))}
    summed = jq.calibrate(lambda p, x: pair(p, x, out_sharding=P("data", None)), split, spread)
facts["stats-explicit-and-model"] = same(alone, summed)
facts["stats-explicit-whole"] = all(part.sharding.is_fully_replicated for part in jax.tree.leaves(summed))

# And used there: to write weights that lie on one device or on the mesh, and where each is written on the one before.
weights = {key: rng.standard_normal((16, 16)).astype(np.float32) for key in two}
placed = jax.tree.map(jax.device_put, weights, {"up": on(None, "model", mesh=explicit), "down": on(mesh=explicit)})
weighted = jq.rtn(jq.int4(group=8), jq.least_squares)
tree = {"up": placed["up"], "down": weights["down"]}
there, here = (jq.quantize_params(w, weighted, stats=stats) for w, stats in ((tree, summed), (weights, alone)))
facts["written"] = {k: relative(jq.dequantize(there)[k], jq.dequantize(here)[k]) for k in here}
there, here = (
    jq.quantize_sequentially(pair, *given, weighted) for given in ((placed, spread[:1]), (weights, [numbers]))
)
facts["in-turn"] = max(relative(jq.dequantize(there)[k], jq.dequantize(here)[k]) for k in here)
facts["in-turn-lies"] = lies_like(there["up"], placed["up"].sharding)

# A step of training on a mesh: the gradients and the update of one device, parameters and states split.
def train(params, state, x, key):
    fn = jq.qat(mlp, jq.int4(group=16)) if key is None else jq.qat(mlp, jq.int8, gradients=jq.int8, key=key)
    value, gradient = jax.value_and_grad(lambda p: jnp.mean(fn(p, x) ** 2))(params)
    updates, state = optimizer.update(gradient, state, params)
    return value, gradient, jax.tree.map(lambda w, u: w + u, params, updates), state

optimizer = jq.adamw8bit(1e-3)
split = {"up": put(params["up"], (None, "model")), "down": put(params["down"], ("model", None))}
for key, noise in (("float", None), ("int8", jax.random.key(0))):
    whole, spread = (
        jax.jit(train)(tree, jax.jit(optimizer.init)(tree), rows, noise)
        for tree, rows in ((params, x), (split, jax.device_put(x, on("data"))))
    )
    facts[f"qat-{key}"] = max(relative(a, b) for a, b in zip(jax.tree.leaves(spread[:3]), jax.tree.leaves(whole[:3])))
    facts[f"qat-{key}-split"] = not spread[2]["up"].sharding.is_fully_replicated

print(json.dumps(facts))
"""

WEIGHT = 64 * 256
TOKENS, OUTPUTS = 8 // 4, 64  # of a device
FORMATS = ["channel", "group", "affine", "fp8", "nf4"]


@pytest.fixture(scope="module")
def facts():
    """What the program with eight devices found."""
    (facts,) = found(started(PROGRAM, XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK}"))
    assert facts["devices"] == 8
    return facts


@pytest.mark.parametrize("name", ["linen_mlp", "linen_transformer"])
def test_tensor_parallel_models_compute_what_one_device_does(name, facts):
    """Law: integer sums are exact in any order, so only the float steps around them differ, in their last bits."""
    assert facts[f"{name}-split"] and facts[f"{name}-bytes"]
    assert facts[f"{name}-int8"] < 1e-5
    assert facts[f"{name}-float"] < 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_no_device_gathers_a_weight(format, facts):
    """Law: column and row parallel layers communicate activations, never an array as large as a shard of a weight."""
    assert facts[f"mlp-{format}"] < 1e-5
    assert facts[f"gathered-{format}"] < WEIGHT // 2 < facts["gathered-on-purpose"]


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_row_parallel_layer_adds_up(format, facts):
    """Law: one number for each output that a device has, and nothing larger.

    A scale per channel is the same for all partial sums: they are added as int32, where no order matters, and scaled
    once. A scale per group is not: partial sums are scaled before they are added.
    """
    sent = [(dtype, n) for dtype, n in facts[f"sent-{format}"] if n > TOKENS]
    assert sent == [("s32" if format in ("channel", "affine") else "f32", TOKENS * OUTPUTS)]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("format", FORMATS)
def test_sharded_weights_are_written_where_they_lie(format, kind, facts):
    """Law: the bytes of one device, lying as `shardings_like` says; what is sent is one maximum for each output."""
    assert facts[f"{kind}-{format}-bytes"] and facts[f"{kind}-{format}-lies"]
    assert facts[f"{kind}-{format}-sent"] <= (0 if format in ("group", "nf4") else 256 // 2)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_search_over_sharded_weights(kind, facts):
    """Law: an algorithm sees the whole weight, on a mesh of either kind."""
    assert facts[f"{kind}-searched-lies"] and facts[f"{kind}-searched"] < 1e-5


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_groups_that_shards_would_cut(kind, facts):
    """Law: an error that names the parameter and the groups that fit, instead of gathering it."""
    message = facts[f"{kind}-cut"]
    assert message.startswith("up: groups of 32 are cut by shards of 16 (axis 0 of (64, 256) over 'data')")
    assert "[8]" in message


def test_a_column_parallel_layer_on_a_mesh_of_explicit_axes(facts):
    """Law: as on any mesh; `jax.make_mesh` makes this kind unless asked."""
    assert facts["explicit"] < 1e-6


@pytest.mark.parametrize("split", ["data", "data-and-model", "explicit", "explicit-and-model", "explicit-several"])
def test_data_parallel_calibration(split, facts):
    """Law: the statistics of a batch spread over devices are those of one device, bit for bit where sums are exact."""
    assert facts["counts"] == [128.0] * 3
    assert facts[f"stats-{split}"]


def test_statistics_of_a_mesh_of_explicit_axes_serve_quantizers(facts):
    """Law: they are whole on every device, and an algorithm writes from them what it writes on one."""
    assert facts["stats-explicit-whole"] and max(facts["written"].values()) < 1e-6


def test_weights_are_written_one_after_the_other_on_a_mesh_of_explicit_axes(facts):
    """Law: as on one device, each where it lies."""
    assert facts["in-turn"] < 1e-6 and facts["in-turn-lies"]


@pytest.mark.parametrize("backward", ["float", "int8"])
def test_a_step_of_training_on_a_mesh(backward, facts):
    """Law: loss, gradients and updated weights of data and tensor parallel training are those of one device."""
    assert facts[f"qat-{backward}"] < 1e-4 and facts[f"qat-{backward}-split"]
