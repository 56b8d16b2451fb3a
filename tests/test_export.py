"""A quantized model as a file, and its weights as another, run where jaxquant is not installed.

The programs are those of `docs/devices.md`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import QUICK

import jaxquant as jq

TEXT = (Path(__file__).parent.parent / "docs" / "devices.md").read_text()
BLOCKS = dict(re.findall(r"<!-- (\w+) -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL))
FORMATS = {
    "int8": jq.int8,
    "int4": jq.int4(group=16, symmetric=False),
    "int2": jq.int2(group=16),
    "nf4": jq.nf4(group=16),
    "fp8": jq.fp8,
}
READER = r"""
import sys
from pathlib import Path

sys.modules["jaxquant"] = None  # as if it were not installed
for folder in map(Path, sys.argv[1:]):
    names = {"folder": folder}
    exec("import numpy as np; x = np.load(folder / 'x.npy')", names)
    exec((folder.parent / "read.py").read_text(), names)
    names["np"].save(folder / "y.npy", names["y"])
"""


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def arrays():
    """Parameters and tokens."""
    rng = np.random.default_rng(0)
    shapes = {"up": (32, 64), "down": (64, 32), "x": (6, 32)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return params, params.pop("x")


def written(format: jq.Format, folder: Path) -> dict:
    """The names of the program that writes, after it ran."""
    params, x = arrays()
    forward = jq.quantized(mlp)
    names = {"qparams": jq.quantize_params(params, format), "forward": forward, "x": x, "folder": folder}
    exec(BLOCKS["write"], names)
    return names


def test_a_fresh_process_without_jaxquant_gives_the_same_bits(tmp_path):
    """Law: written, read where jaxquant cannot be imported, the same output; weights take the bytes they take here."""
    (tmp_path / "read.py").write_text(BLOCKS["read"])
    expected = {}
    for name, format in FORMATS.items():
        (tmp_path / name).mkdir()
        names = written(format, tmp_path / name)
        np.save(tmp_path / name / "x.npy", names["x"])
        expected[name] = np.asarray(jax.jit(names["forward"])(names["qparams"], names["x"]))
        assert sum(a.nbytes for a in names["arrays"]) == sum(q.nbytes for q in names["qparams"].values())
    folders = [str(tmp_path / name) for name in FORMATS]
    # Compiled as the tests are (conftest.py): another level of optimization may round otherwise.
    environment = {"XLA_FLAGS": QUICK} | os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-I", "-c", READER, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in FORMATS:
        assert np.array_equal(np.load(tmp_path / name / "y.npy"), expected[name]), name


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_for_other_platforms(name, tmp_path):
    """Law: a program for a platform that is not here has the forms of that platform in it."""
    names = written(FORMATS[name], tmp_path)
    exec(BLOCKS["platforms"], names)
    assert names["tpu"].platforms == ("cpu", "tpu") and names["gpu"].platforms == ("cuda",)
    read = jax.export.deserialize(names["tpu"].serialize())
    assert np.array_equal(
        jax.jit(read.call)(names["arrays"], names["x"]), jax.jit(names["forward"])(names["qparams"], names["x"])
    )
    assert "triton" not in names["tpu"].mlir_module()
    assert "triton" in jax.export.deserialize(names["gpu"].serialize()).mlir_module()


def test_a_program_for_a_gpu_says_that_it_is_bound_to_a_version(tmp_path):
    """Law: without being asked, JAX serializes no call that a later version may not read."""
    names = written(jq.int8, tmp_path)
    with pytest.raises(ValueError, match="no compatibility guarantees"):
        jax.export.export(jax.jit(names["flat"]), platforms=["cuda"])(names["arrays"], names["x"]).serialize()


def test_the_program_for_many_devices():
    """Law: on a mesh of one device, too."""
    params, x = arrays()
    names = {"params": params, "x": x, "fn": mlp}
    exec(BLOCKS["sharding"], names)
    assert np.array_equal(names["y"], jax.jit(jq.quantized(mlp))(jq.quantize_params(params), x))
