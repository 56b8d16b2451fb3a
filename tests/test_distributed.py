"""Two processes on one machine, as two hosts: each holds half of the weights, and both compute what one would.

The processes find each other as `docs/devices.md` says, on loopback, and add up through gloo. Each checks its own half.
"""

import re
import socket

import pytest
from processes import ROOT, found, started

pytestmark = pytest.mark.devices

DOCUMENTED = ROOT / "docs" / "devices.md"
START = r"""
import sys

coordinator, hosts, host = sys.argv[1], 2, int(sys.argv[2])
"""
PROGRAM = r"""
import json
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxquant.sharding import shardings_like

mesh = jax.make_mesh((2, 2), ("model", "data"), axis_types=(AxisType.Auto,) * 2)
facts = {"devices": jax.device_count(), "here": jax.local_device_count()}
rng = np.random.default_rng(0)
params = {"up": rng.standard_normal((64, 128)), "down": rng.standard_normal((128, 64))}
params = jax.tree.map(lambda w: w.astype(np.float32), params)
x = rng.standard_normal((8, 64)).astype(np.float32)
places = {"up": NamedSharding(mesh, P(None, "model")), "down": NamedSharding(mesh, P("model", None))}

def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]

def mine(array, whole):
    # Whether the shards that this process holds are those of the array that one process has.
    return all(np.array_equal(shard.data, np.asarray(whole)[shard.index]) for shard in array.addressable_shards)

halves = jax.tree.map(lambda w, sharding: spread(w.__getitem__, w.shape, sharding), params, places)
facts["split"] = not halves["up"].is_fully_addressable
rows = spread(x.__getitem__, x.shape, NamedSharding(mesh, P("data")))
stats, alone = jq.calibrate(mlp, halves, [rows]), jq.calibrate(mlp, params, [x])
facts["absmax"] = mine(stats["up"].absmax, alone["up"].absmax)
facts["gram"] = mine(jnp.round(stats["up"].gram), jnp.round(alone["up"].gram))
for key, format in (("channel", jq.int8), ("group", jq.int4(group=16))):
    q, expected = jq.quantize_params(halves, format), jq.quantize_params(params, format)
    likes = shardings_like(q, places)
    facts[f"{key}-bytes"] = all(map(mine, jax.tree.leaves(q), jax.tree.leaves(expected)))
    facts[f"{key}-lies"] = all(
        a.sharding.is_equivalent_to(s, a.ndim) for a, s in zip(jax.tree.leaves(q), jax.tree.leaves(likes), strict=True)
    )
    run = jax.jit(jq.quantized(mlp), out_shardings=NamedSharding(mesh, P()))
    there, here = run(q, rows), jax.jit(jq.quantized(mlp))(expected, x)
    facts[key] = float(np.linalg.norm(np.asarray(there) - np.asarray(here)) / np.linalg.norm(np.asarray(here)))
print(json.dumps(facts))
"""


def run_both() -> list[dict]:
    """What each of two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (hosts,) = re.findall(r"<!-- hosts -->\n```python\n(.*?)```", DOCUMENTED.read_text(), flags=re.DOTALL)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return found(*(started(START + hosts + PROGRAM, address, host, **flags) for host in ("0", "1")))


def test_two_processes_compute_what_one_does():
    """Law: same codes, scales, statistics and outputs; no process ever holds a whole weight."""
    for facts in run_both():
        assert (facts["devices"], facts["here"], facts["split"]) == (4, 2, True)
        assert facts["absmax"] and facts["gram"]
        for key in ("channel", "group"):
            assert facts[f"{key}-bytes"] and facts[f"{key}-lies"]
            assert facts[key] < 1e-5
