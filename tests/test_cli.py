"""The command line: real files in, exit codes and one line of error out."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.cli.main import main
from jaxquant.files.container import write_container


@pytest.fixture
def checkpoint(tmp_path):
    weight = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    write_container(
        tmp_path / "model.safetensors", {"a.proj.weight": weight, "a.norm.weight": np.ones(4, np.float32)}, {}
    )
    return tmp_path / "model.safetensors"


def test_quantize_and_inspect(tmp_path, checkpoint, capsys):
    dst = tmp_path / "q.safetensors"
    assert main(["quantize", str(checkpoint), str(dst), "--format", "int4", "--group", "16", "--affine"]) == 0
    assert "int4 g16 affine" in capsys.readouterr().out
    q = jq.load(dst)["a"]["proj"]["weight"]
    assert q.description == "int4 g16 affine" and q.shape == (32, 64)
    assert main(["inspect", str(dst)]) == 0
    header, *rows, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["tensor", "shape", "format", "bytes", "values"]
    (row,) = [row for row in rows if row.startswith("a/proj/weight")]
    assert "32 x 64" in row and "int4 g16 affine" in row and f"{q.nbytes:,}" in row
    assert row.rstrip().endswith("7") and "█" in row
    assert total == f"2 tensors, {q.nbytes + 16:,} bytes in memory"


def test_inspect_reads_what_others_wrote(checkpoint, tmp_path, capsys):
    assert main(["inspect", str(checkpoint)]) == 0
    assert "float32" in capsys.readouterr().out
    jq.save(tmp_path / "q", {"w": jq.turned(jq.quantize(jnp.eye(8))), "n": 3, "nan": jnp.array([1, 2, np.nan])})
    assert main(["inspect", str(tmp_path / "q")]) == 0
    shown = capsys.readouterr().out
    assert "int8 per-channel turned" in shown and "not finite" in shown


def test_errors_are_one_line_and_an_exit_code(checkpoint, tmp_path, capsys):
    (tmp_path / "broken").write_bytes(b"GGUF" + b"\0" * 20)
    calls = {
        "quantize": ["quantize", str(checkpoint), str(tmp_path / "q"), "--format", "int4", "--group", "7"],
        "inspect": ["inspect", str(tmp_path / "broken")],
        "eval": ["eval", str(tmp_path / "nowhere.gguf")],
    }
    for command, arguments in calls.items():
        assert main(arguments) == 1
        shown = capsys.readouterr()
        assert shown.err.startswith(f"jaxquant {command}: ") and shown.err.count("\n") == 1 and not shown.out
    for arguments in ([], ["quantize", "--format", "int5", "a", "b"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


@pytest.mark.parametrize("layers", (0, 2**40, 1.5, "many"))
def test_a_llama_of_no_number_of_layers(tmp_path, capsys, layers):
    path = tmp_path / "a.gguf"
    about = {"general.architecture": "llama", "llama.attention.head_count": 2, "llama.block_count": layers}
    jq.save_gguf(path, {"token_embd.weight": jnp.ones((4, 4))}, about)
    assert main(["eval", str(path)]) == 1
    assert "'llama.block_count' is" in capsys.readouterr().err


@pytest.mark.parametrize("command", ("quantize", "inspect", "eval"))
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and f"example: jaxquant {command} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.model
@pytest.mark.example
def test_eval_of_smollm2(capsys):
    from llama_gguf import fetch_smollm2

    assert main(["eval", str(fetch_smollm2()), "--windows", "1", "--format", "int8"]) == 0
    header, plain, rounded, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["weights", "perplexity", "KL"]
    exact, ours = float(plain.split()[-1]), float(rounded.split()[-2])
    assert 5 < exact < 40 and abs(ours / exact - 1) < 0.03
