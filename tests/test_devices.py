"""A sharded tree of QTensors computes what it computes on one device, and no device gathers a weight.

Eight fake CPU devices, a mesh of data by model, tensor parallelism as one writes it for floats: `NamedSharding`s on
the codes, and the same on a scale along the axes where it is more than one. In a process of its own, because the number
of devices is fixed when JAX starts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.devices

PROGRAM = r"""
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jaxquant as jq
from models import MODELS

facts = {"devices": jax.device_count()}
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def put(leaf, spec):
    # A part that is one along an axis is whole on every device there.
    def part(array):
        axes = [axis if n > 1 else None for axis, n in zip(spec, array.shape)]
        return jax.device_put(array, NamedSharding(mesh, P(*axes)))
    return jax.tree.map(part, leaf)

def shard(path, leaf):
    name = jax.tree_util.keystr(path)
    if not isinstance(leaf, jq.QTensor):
        return jax.device_put(leaf, NamedSharding(mesh, P()))
    if "embedding" in name:
        return put(leaf, ("model", None))
    if leaf.ndim == 3:
        return put(leaf, ("model", None, None) if "'out'" in name else (None, "model", None))
    return put(leaf, (None, "model") if leaf.shape[1] > leaf.shape[0] else ("model", None))

def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))

def is_q(leaf):
    return isinstance(leaf, jq.QTensor)

for name in ("linen_mlp", "linen_transformer"):
    model = MODELS[name]()
    args = [jnp.tile(a, (4,) + (1,) * (a.ndim - 1)) for a in model.args]
    q = jq.quantize_params(model.params)
    expected = jax.jit(jq.quantized(model.fn))(q, *args)
    sharded = jax.tree_util.tree_map_with_path(shard, q, is_leaf=is_q)
    spread = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in args]
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

def gathered(text):
    found = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    return max([int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found], default=0)

# What the search finds where a weight is gathered.
whole = jax.jit(lambda w: w + 1, out_shardings=NamedSharding(mesh, P()))
facts["gathered-on-purpose"] = gathered(whole.lower(put(params["up"], (None, "model"))).compile().as_text())
for key, format in (("channel", jq.int8), ("group", jq.int8(group=16)), ("affine", jq.int8(symmetric=False))):
    q = jq.quantize_params(params, format)
    sharded = {"up": put(q["up"], (None, "model")), "down": put(q["down"], ("model", None))}
    run = jax.jit(jq.quantized(mlp))
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    text = run.lower(sharded, spread).compile().as_text()
    facts[f"gathered-{key}"] = gathered(text)
    facts[f"reduces-{key}"] = re.findall(r"(s32|f32)\[[\d,]*\][^=]*? all-reduce(?:-start)?\(", text)
    facts[f"mlp-{key}"] = relative(run(sharded, spread), run(q, x))

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

rows = NamedSharding(mesh, P("data"))
alone = jq.calibrate(deep, layers, [numbers, 2 * numbers])
spread = jq.calibrate(deep, layers, [jax.device_put(numbers, rows), jax.device_put(2 * numbers, rows)])
columns = {"w": jax.device_put(layers["w"], NamedSharding(mesh, P(None, None, "model")))}
both = jq.calibrate(deep, columns, [jax.device_put(numbers, rows), 2 * numbers])
facts["counts"] = np.asarray(alone["w"].count).tolist()
for key, stats in (("data", spread), ("data-and-model", both)):
    pairs = zip(jax.tree.leaves(alone), jax.tree.leaves(stats), strict=True)
    facts[f"stats-{key}"] = all(np.array_equal(*pair) for pair in pairs)

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
        for tree, rows in ((params, x), (split, jax.device_put(x, NamedSharding(mesh, P("data")))))
    )
    facts[f"qat-{key}"] = max(relative(a, b) for a, b in zip(jax.tree.leaves(spread[:3]), jax.tree.leaves(whole[:3])))
    facts[f"qat-{key}-split"] = not spread[2]["up"].sharding.is_fully_replicated

print(json.dumps(facts))
"""

WEIGHT = 64 * 256


@pytest.fixture(scope="module")
def facts():
    """What the program with eight devices found."""
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {
        "PYTHONPATH": paths,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["devices"] == 8
    return facts


@pytest.mark.parametrize("name", ["linen_mlp", "linen_transformer"])
def test_tensor_parallel_models_compute_what_one_device_does(name, facts):
    """Law: integer sums are exact in any order, so only the float steps around them differ, in their last bits."""
    assert facts[f"{name}-split"]
    assert facts[f"{name}-int8"] < 1e-5
    assert facts[f"{name}-float"] < 1e-5


@pytest.mark.parametrize("format", ["channel", "group", "affine"])
def test_no_device_gathers_a_weight(format, facts):
    """Law: column and row parallel layers communicate activations, never an array as large as a shard of a weight."""
    assert facts[f"mlp-{format}"] < 1e-5
    assert facts[f"gathered-{format}"] < WEIGHT // 2 < facts["gathered-on-purpose"]


def test_a_row_parallel_layer_reduces_integers(facts):
    """Law: the partial sums of a row-parallel layer are added as int32, so their order does not matter."""
    assert "s32" in facts["reduces-channel"]


def test_a_column_parallel_layer_on_a_mesh_of_explicit_axes(facts):
    """Law: as on any mesh; `jax.make_mesh` makes this kind unless asked."""
    assert facts["explicit"] < 1e-6


@pytest.mark.parametrize("split", ["data", "data-and-model"])
def test_data_parallel_calibration(split, facts):
    """Law: the statistics of a batch spread over devices are those of one device, bit for bit where sums are exact."""
    assert facts["counts"] == [128.0] * 3
    assert facts[f"stats-{split}"]


@pytest.mark.parametrize("backward", ["float", "int8"])
def test_a_step_of_training_on_a_mesh(backward, facts):
    """Law: loss, gradients and updated weights of data and tensor parallel training are those of one device."""
    assert facts[f"qat-{backward}"] < 1e-4 and facts[f"qat-{backward}-split"]
