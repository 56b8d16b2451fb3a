"""The command line: real files in, exit codes and one line of error out."""

import os
import re
import subprocess
import sysconfig
import tracemalloc
import weakref
from importlib.metadata import entry_points
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import jaxquant as jq
from jaxquant.cli import inspect, leaves
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


BYTES = (np.int8, np.uint8, np.bool_, jnp.int4, jnp.uint4, jnp.int2, jnp.float8_e4m3fn, jnp.float8_e5m2)


@pytest.mark.parametrize("dtype", BYTES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("size", (0, 1, 30, 2500))
def test_codes_that_are_counted_have_the_picture_of_the_numbers_they_are(monkeypatch, dtype, size):
    monkeypatch.setattr(inspect, "_PART", 1000)
    numbers = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    codes = numbers.view(dtype) if jnp.issubdtype(dtype, jnp.floating) else numbers.astype(dtype)
    with np.errstate(invalid="ignore"):
        assert inspect._bars(codes) == inspect._bars(codes.astype(np.float32))


def test_everything_of_a_picture():
    codes = np.repeat(np.arange(-8, 8), [1, 0, 2, 3, 4, 5, 6, 7, 0, 8, 8, 8, 8, 8, 8, 4]).astype(np.int8)
    assert inspect._bars(codes) == inspect._bars(codes.astype(jnp.int4)) == "-8 ▁ ▂▃▄▅▆▇ ██████▄ 7"


def everything():
    """One of each thing that a checkpoint of ours may hold."""
    w = jax.random.normal(jax.random.key(0), (16, 32))
    affine = jq.quantize(w, jq.int3(group=8, symmetric=False))
    nf4 = jq.quantize(w, jq.nf4(group=8))
    return {
        "layers": [{"w": affine, "b": jnp.ones(3)}, {"w": jq.turned(jq.quantize(w)), "b": (nf4, w[0])}],
        "lora": jq.add_lora({"kernel": w}, 2, key=jax.random.key(1)),
        "key": jax.random.key(7),
        "step": 3,
        "none": None,
        "close": jnp.array([1, np.nextafter(np.float32(1), np.float32(2))]),
        "far": jnp.array([-3e38, 3e38]),
    }


@pytest.mark.parametrize("shard_bytes", (1, 10**9))
def test_leaves_come_one_by_one_as_load_has_them(tmp_path, capsys, shard_bytes):
    jq.save(tmp_path / "q", everything(), shard_bytes=shard_bytes)
    tree = jq.load(tmp_path / "q")
    found = dict(leaves.each_leaf(tmp_path / "q", lambda name, leaf: (name, leaf)))
    expected = dict(leaves._named((), tree))
    assert found.keys() == expected.keys() and "layers/1/b/0" in found and len(found) == 9
    for name, leaf in found.items():
        assert jax.tree.structure(leaf) == jax.tree.structure(expected[name])
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(_plain(a), _plain(b)), leaf, expected[name])
    assert main(["inspect", str(tmp_path / "q")]) == 0
    assert "9 tensors" in capsys.readouterr().out


def _plain(array):
    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array


def test_no_more_than_one_leaf_of_ours_is_in_memory(tmp_path):
    count, size = 12, 2**22
    tree = {str(i): jq.quantize(jnp.full((2, size // 2), i + 1.0), jq.int8) for i in range(count)}
    jq.save(tmp_path / "q", tree, shard_bytes=4 * size)
    del tree
    seen: list[weakref.ref] = []

    def look(name, leaf):
        assert name == str(len(seen)) and leaf.shape == (2, size // 2)
        assert [earlier for earlier in seen if earlier() is not None] == []
        seen.append(weakref.ref(leaf.codes))

    leaves.each_leaf(tmp_path / "q", look)  # what is traced and compiled takes many MB of Python's, but once
    seen.clear()
    tracemalloc.start()
    leaves.each_leaf(tmp_path / "q", look)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A leaf, its copy while it is read, and some MB that Python takes where it has run other tests.
    assert len(seen) == count and peak < count // 2 * size


def test_a_checkpoint_that_is_replaced_meanwhile_is_looked_at_again(tmp_path):
    def of(value):
        return {str(i): jnp.full(4, value + i) for i in range(3)}

    jq.save(tmp_path / "q", of(0.0), shard_bytes=1)
    seen = []

    def look(name, leaf):
        seen.append(name)
        if seen == ["0"]:
            jq.save(tmp_path / "q", of(10.0), shard_bytes=1)  # and the files of the first are gone
        return float(leaf[0])

    assert leaves.each_leaf(tmp_path / "q", look) == [10.0, 11.0, 12.0]
    assert seen == ["0", "0", "1", "2"]


def test_inspect_says_what_is_damaged(tmp_path, capsys):
    jq.save(tmp_path / "q", {"a": jnp.ones(8), "b": {"w": jq.quantize(jnp.eye(8))}})
    data = (tmp_path / "q").read_bytes()
    (tmp_path / "q").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["inspect", str(tmp_path / "q")]) == 1
    shown = capsys.readouterr()
    assert f"{tmp_path / 'q'}: the bytes of tensor 'b/w/codes' are not those" in shown.err and not shown.out


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


def tiny_llama():
    """The metadata and the tensors of a Llama of one block, whose tokens are bytes and one pair of them."""
    rng, width = np.random.default_rng(0), 8
    w = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    tokens = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "<end>"]
    shapes = {"attn_q": (8, width), "attn_k": (4, width), "attn_v": (4, width), "attn_output": (width, 8)}
    shapes |= {"ffn_gate": (16, width), "ffn_up": (16, width), "ffn_down": (width, 16)}
    tensors = {f"blk.0.{name}.weight": w(*shape) for name, shape in shapes.items()}
    tensors |= {name: np.ones(width, np.float32) for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")}
    tensors |= {"token_embd.weight": w(len(tokens), width), "output_norm.weight": np.ones(width, np.float32)}
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["t h"],
    }
    return metadata, tensors


def eval_of(tmp_path, metadata, tensors) -> int:
    text = tmp_path / "text.txt"
    if not text.exists():
        text.write_text("the other thing <end> " * 60)
    jq.save_gguf(tmp_path / "a.gguf", tensors, metadata)
    return main(["eval", str(tmp_path / "a.gguf"), "--text", str(text), "--windows", "1"])


def test_eval_of_a_small_llama(tmp_path, capsys):
    assert eval_of(tmp_path, *tiny_llama()) == 0
    header, plain, rounded, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["weights", "perplexity", "KL"]
    assert abs(float(rounded.split()[-2]) / float(plain.split()[-1]) - 1) < 0.05


SMALL = np.ones((2, 8), np.float32)
# A change of the metadata or of the tensors, None to leave a thing out, and what the error says.
NO_LLAMAS = [
    ({"general.architecture": "gpt2"}, "'gpt2'.*Choose"),
    ({"general.architecture": None}, "None.*Choose"),
    ({"llama.attention.head_count": None}, "'llama.attention.head_count' is None, not a number. Convert"),
    ({"llama.attention.head_count": "two"}, "'llama.attention.head_count' is 'two', not a number. Convert"),
    ({"llama.attention.head_count": 1.5}, "'llama.attention.head_count' is 1.5, not a positive"),
    ({"llama.attention.head_count": 3}, "8 queries do not make 3 heads.*Convert"),
    ({"llama.attention.head_count_kv": 3}, "2 heads of an even width, in 3 groups"),
    ({"llama.attention.layer_norm_rms_epsilon": True}, "rms_epsilon' is True, not a number"),
    ({"llama.block_count": 99}, "'llama.block_count' is 99, and it has 11 tensors. Convert"),
    ({"llama.block_count": 2}, r"it lacks.*blk\.1\.attn_k\.weight.*Choose"),
    ({"token_embd.weight": None}, r"it lacks.* token_embd\.weight"),
    ({"blk.0.attn_q.bias": SMALL}, r"blk\.0\.attn_q\.bias.*Choose"),
    ({"blk.0.attn_v.weight": SMALL}, r"'blk\.0\.attn_v\.weight' has the shape \(2, 8\),.*\(4, 8\)\. Convert"),
    ({"token_embd.weight": SMALL[0]}, r"has the shape \(8,\)"),
    ({"token_embd.weight": np.ones((250, 8), np.float32)}, "token 257, and 'token_embd.weight' has 250 rows. Convert"),
    ({"tokenizer.ggml.model": "llama"}, "the kind 'llama' with.*Choose"),
    ({"tokenizer.ggml.pre": "qwen2"}, "the pre-tokenizer 'qwen2'.*Choose"),
    ({"tokenizer.ggml.pre": np.arange(3)}, "the pre-tokenizer array"),
    ({"tokenizer.ggml.tokens": None}, "'tokenizer.ggml.tokens' is None, not a list of texts. Convert"),
    ({"tokenizer.ggml.tokens": 5}, "'tokenizer.ggml.tokens' is 5, not"),
    ({"tokenizer.ggml.merges": [1, 2]}, "'tokenizer.ggml.merges' is array.*, not"),
    ({"tokenizer.ggml.merges": ["th"]}, "'tokenizer.ggml.merges' is a list with 'th', which.*Convert"),
    ({"tokenizer.ggml.merges": ["t x"]}, "a list with 't x'"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "'tokenizer.ggml.token_type' is array.*, not 258 whole numbers"),
    ({"tokenizer.ggml.token_type": None}, "'tokenizer.ggml.token_type' is None, not"),
]


@pytest.mark.parametrize(("change", "message"), NO_LLAMAS, ids=[str(place) for place in range(len(NO_LLAMAS))])
def test_what_is_no_llama_names_the_file_the_value_and_the_fix(tmp_path, capsys, change, message):
    metadata, tensors = tiny_llama()
    for name, value in change.items():
        of = tensors if name.endswith((".weight", ".bias")) else metadata
        of[name] = value
        if value is None:
            del of[name]
    assert eval_of(tmp_path, metadata, tensors) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"jaxquant eval: {tmp_path / 'a.gguf'}: ") and shown.err.count("\n") == 1
    assert re.search(message, shown.err) and not shown.out


def test_a_text_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    assert eval_of(tmp_path, *tiny_llama()) == 1
    assert f"{tmp_path / 'text.txt'}: it is not UTF-8" in capsys.readouterr().err


SCRIPT = Path(sysconfig.get_path("scripts")) / "jaxquant"


@pytest.mark.skipif(not SCRIPT.exists(), reason="jaxquant is not installed")
def test_the_installed_command(checkpoint, tmp_path):
    """As a user has it: a process of its own, elsewhere, with the exit code that `main` returns."""
    (entry,) = entry_points(group="console_scripts", name="jaxquant")
    assert entry.load() is main

    def run(*arguments: str) -> subprocess.CompletedProcess:
        place = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"}
        return subprocess.run([SCRIPT, *arguments], cwd=tmp_path, env=place, capture_output=True, encoding="utf-8")

    helped = run("--help")
    assert helped.returncode == 0 and "usage: jaxquant" in helped.stdout and "inspect" in helped.stdout
    shown = run("inspect", checkpoint.name)
    assert shown.returncode == 0 and shown.stdout.splitlines()[-1] == "2 tensors, 8,208 bytes in memory"
    assert "a/proj/weight" in shown.stdout and "█" in shown.stdout
    missing = run("inspect", "nowhere")
    assert missing.returncode == 1 and "jaxquant inspect: " in missing.stderr and "nowhere" in missing.stderr


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
