"""What the README and the examples show runs as it stands there."""

import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).parent.parent


def test_the_readmes_code():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    model = nn.Sequential([nn.Embed(16, 8), nn.Dense(16)])
    tokens = jnp.zeros((2, 4), jnp.int32)
    params = model.init(jax.random.key(0), tokens)
    names = {"model": model, "params": params, "tokens": tokens}
    exec(code, names)
    assert names["logits"].shape == (2, 4, 16)
    assert jnp.abs(names["logits"] - model.apply(params, tokens)).max() < 0.1


def test_quickstart():
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown.count("int8 x int8 -> int32") == 2
    assert "int4 g64" in shown
    for error in re.findall(r"relative error (\S+)", shown):
        assert float(error) < 0.12


def test_the_readme_has_two_commands_and_code_by_line_eight():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") < 8
    assert lines[:40].count("```bash") == 2
