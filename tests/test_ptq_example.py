"""The table of post-training methods, end to end on the real model and a few tokens, and resumed."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "ptq_smollm2.py"


@pytest.mark.model
@pytest.mark.example
def test_the_table_is_made_in_one_command(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    cells = json.loads((tmp_path / "ptq_smollm2.json").read_text())["W4 g64"]
    assert list(cells) == ["rtn", "rotated(gptq)"]
    for kind in ("in domain", "other kind"):
        plain, best = (cell["scores"][kind] for cell in cells.values())
        assert best["kl"] < plain["kl"]
    assert 4.5 < cells["rtn"]["bits"] < cells["rotated(gptq)"]["bits"] < 4.6
    page = (tmp_path / "ptq_smollm2.md").read_text()
    assert re.search(r"\| rotated\(gptq\) \| 4\.5\d \|", page) and "rotated(gptq)" in shown
    assert (tmp_path / "ptq_smollm2.png").read_bytes().startswith(b"\x89PNG")
