"""What the README and the examples show runs as it stands there."""

import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_code_of_the_pages(tmp_path, monkeypatch):
    """The blocks of the README in order, and that of the algorithms, on a small model."""
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential([nn.Embed(16, 128), nn.Dense(16)])
    tokens = jax.random.randint(jax.random.key(1), (2, 4), 0, 16)
    params = model.init(jax.random.key(0), tokens)
    names = {"model": model, "params": params, "tokens": tokens, "batches": [tokens], "batch": tokens}
    first, *others = blocks("README.md")
    exec(first, names)
    assert names["logits"].shape == (2, 4, 16)
    assert jnp.abs(names["logits"] - model.apply(params, tokens)).max() < 0.1
    for code in (*others, *blocks("docs/algorithms.md")):
        exec(code, names)
        assert "int4 g64 affine rotated" in names["qparams"]["params"]["layers_1"]["kernel"].description
    train, learn, adapt = blocks("docs/training.md")
    exec(train, names)
    assert jax.tree.structure(names["gradient"]) == jax.tree.structure(names["params"])
    exec(learn, names)
    assert "int2 g32" in names["qparams"]["params"]["layers_1"]["kernel"].description
    with jax.numpy_dtype_promotion("standard"):
        exec(adapt, names)
    assert "int4 g64 affine rotated" in names["qparams"]["params"]["layers_1"]["kernel"].description


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
