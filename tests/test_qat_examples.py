"""The examples of training, end to end on a few steps."""

import json
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name, *options) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, options)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.example
def test_digits(tmp_path):
    """One epoch each: training through the rounding ends above rounding."""
    run("qat_digits.py", "--smoke", "--out", tmp_path)
    found = json.loads((tmp_path / "qat_digits.json").read_text())
    assert found["int2"]["qat"] > found["int2"]["nearest"] and found["int8"] > 0.5
    assert (tmp_path / "qat_digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.model
@pytest.mark.example
def test_smollm2_trains_and_goes_on_from_a_checkpoint(tmp_path):
    """Two steps lower the KL; the same command a second time takes none and finds the same figures."""
    options = ("--smoke", "--remat", "--out", tmp_path, "--checkpoints", tmp_path / "at")
    shown = run("qat_smollm2.py", *options)
    first = json.loads((tmp_path / "qat_smollm2_w3.json").read_text())
    kl = {name: scores["in domain"]["kl"] for name, scores in first["scores"].items()}
    assert kl["qat"] < kl["least squares"] < kl["rounding"] and "tokens/s" in shown
    assert "going on from step 2" in run("qat_smollm2.py", *options)
    assert json.loads((tmp_path / "qat_smollm2_w3.json").read_text())["scores"] == first["scores"]


@pytest.mark.model
@pytest.mark.example
def test_qlora_teaches_without_touching_the_base(tmp_path):
    """Two steps lower the loss; the example itself fails if a byte of the base moved."""
    run("qlora_smollm2.py", "--smoke", "--out", tmp_path)
    found = json.loads((tmp_path / "qlora_smollm2.json").read_text())
    assert found["losses"][1] < found["losses"][0] and found["questions"] == 2
    sizes = found["bytes"]
    assert sizes["base in NF4"] < sizes["the same in float32"] / 7.5
    assert sizes["moments, 8-bit"] < 0.3 * sizes["moments, float32"]
