"""`quantize_checkpoint`: part by part what `quantize_params` gives of the whole; stopped, it goes on where it was."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import found, started
from test_files import same

import jaxquant as jq
from jaxquant.errors import FileError, NoMatchError, NonFiniteError, ShapeError
from jaxquant.files import slabs, stream
from jaxquant.files.container import write_container


def tensors(layers=3):
    generator = np.random.default_rng(0)
    arrays = {"model.embed_tokens.weight": generator.standard_normal((24, 16)).astype(jnp.bfloat16)}
    for layer in range(layers):
        arrays[f"model.layers.{layer}.norm.weight"] = np.ones(16, np.float32)
        arrays[f"model.layers.{layer}.proj.weight"] = generator.standard_normal((32, 16)).astype(np.float32)
        arrays[f"model.layers.{layer}.steps"] = np.arange(3)
    return arrays


def source(folder, arrays):
    """A checkpoint of two files, as Hugging Face lays them out."""
    folder.mkdir()
    names = list(arrays)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        write_container(folder / file, {name: arrays[name] for name in part}, {})
    places = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(stream, "_PART", 3000)


def test_it_is_quantize_params_of_the_whole(tmp_path, small_parts):
    arrays = tensors()
    src, dst, seen = source(tmp_path / "src", arrays), tmp_path / "q.safetensors", []
    jq.quantize_checkpoint(src, dst, jq.int4(group=8), progress=lambda done, total: seen.append((done, total)))
    whole = jq.quantize_params(jq.load_safetensors(src), jq.int4(group=8))
    same(jq.load(dst), jax.tree.map(lambda leaf: leaf if leaf.dtype == np.int64 else jnp.asarray(leaf), whole))
    size = sum(array.nbytes for array in arrays.values())
    assert len(seen) > 2 and seen[-1] == (size, size) and seen == sorted(seen)
    assert jq.load_metadata(dst)["quantizer"] == repr(jq.int4(group=8))


def test_a_run_that_was_stopped_goes_on(tmp_path, small_parts, monkeypatch):
    src, dst = source(tmp_path / "src", tensors()), tmp_path / "q.safetensors"
    quantized = []

    def counted(tree, *args, **options):
        quantized.extend(tree)
        if len(quantized) == 3:
            raise KeyboardInterrupt
        return jq.quantize_params(tree, *args, **options)

    monkeypatch.setattr(stream, "quantize_params", counted)
    with pytest.raises(KeyboardInterrupt):
        jq.quantize_checkpoint(src, dst)
    assert not dst.exists()
    jq.quantize_checkpoint(src, dst)
    again = [name for name in set(quantized) if quantized.count(name) > 1]
    assert len(set(quantized)) == 4 and len(again) < 3  # at most the part that was not finished
    same(jq.load(dst)["model"]["layers"]["2"]["proj"]["weight"], whole_of(src)["layers"]["2"]["proj"]["weight"])


def whole_of(src):
    return jq.quantize_params(jq.load_safetensors(src))["model"]


def test_another_quantizer_or_source_starts_anew(tmp_path, small_parts):
    src, dst = source(tmp_path / "src", tensors()), tmp_path / "q.safetensors"
    for format in (jq.int8, jq.int4):
        jq.quantize_checkpoint(src, dst, format)
        assert jq.load(dst)["model"]["embed_tokens"]["weight"].bits == format.bits
    files = {path.name for path in tmp_path.iterdir()}
    changed = {name: -array for name, array in tensors().items()}
    for path in src.iterdir():
        path.unlink()
    src.rmdir()
    jq.quantize_checkpoint(source(src, changed), dst, jq.int4)
    same(jq.load(dst)["model"]["embed_tokens"], whole_of_int4(src)["embed_tokens"])
    assert files.isdisjoint({path.name for path in tmp_path.glob("q-*")})  # the old ones are gone


def whole_of_int4(src):
    return jq.quantize_params(jq.load_safetensors(src), jq.int4)["model"]


def test_a_broken_part_is_written_anew(tmp_path, small_parts):
    src, dst = source(tmp_path / "src", tensors()), tmp_path / "q.safetensors"
    jq.quantize_checkpoint(src, dst)
    before = jq.load(dst)
    for path in tmp_path.glob("q-*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileError):
        jq.load(dst)
    jq.quantize_checkpoint(src, dst)
    same(jq.load(dst), before)


CASES = {
    "nothing chosen": ({}, {"where": lambda path, w: False}, NoMatchError, "model.layers.0.proj.weight"),
    "not finite": ({"model.layers.1.proj.weight": np.full((4, 4), np.nan, np.float32)}, {}, NonFiniteError, "layers/1"),
    "a group that does not fit": ({}, {"quantizer": jq.int4(group=7)}, ShapeError, "model/embed_tokens/weight"),
    "names through a tensor": ({"model.layers.1.proj.weight.x": np.ones(3)}, {}, FileError, "proj.weight"),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_name_the_tensor_and_leave_the_old_checkpoint(tmp_path, case):
    changes, options, error, says = CASES[case]
    src, dst = source(tmp_path / "src", tensors() | changes), tmp_path / "q.safetensors"
    jq.save(dst, {"old": jnp.ones(2)})
    with pytest.raises(error, match=says):
        jq.quantize_checkpoint(src, dst, **options)
    same(jq.load(dst), {"old": jnp.ones(2)})


INDICES = {
    "above": ({"w": "../out.safetensors"}, "not a plain name"),
    "absolute": ({"w": "/etc/passwd"}, "not a plain name"),
    "a link": ({"w": "link.safetensors"}, "outside of that folder"),
    "missing": ({"w": "gone.safetensors"}, "missing"),
    "no such tensor": ({"v": "in.safetensors"}, "does not have it"),
    "no names": ({"w": 3}, "weight_map"),
    "no map": (None, "weight_map"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_cannot_lead_elsewhere(tmp_path, case):
    places, says = INDICES[case]
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "out.safetensors", folder / "in.safetensors"):
        write_container(path, {"w": np.zeros(4, np.float32)}, {})
    (folder / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({} if places is None else {"weight_map": places}))
    for read in (jq.load_safetensors, lambda src: jq.quantize_checkpoint(src, tmp_path / "q")):
        with pytest.raises(FileError, match=says):
            read(folder)


FORMATS = {
    "int8": jq.int8,
    "int4 g8": jq.int4(group=8),
    "int4 g8 affine": jq.int4(group=8, symmetric=False),
    "int3": jq.int3,
    "int2 affine": jq.int2(symmetric=False),
    "fp8": jq.fp8,
    "nf4": jq.nf4(group=8),
    "int8 per tensor": jq.int8(per_channel=False),  # cut along a stack alone
    "rtn": jq.rtn(jq.int4(group=8)),
}
LEAVES = {"a/weight": (45, 16), "a/kernel": (16, 45), "stack/kernel": (7, 16, 6), "conv/kernel": (3, 3, 8, 31)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
@pytest.mark.parametrize("path", LEAVES)
@pytest.mark.parametrize("format", FORMATS)
def test_slabs_are_the_whole_bit_for_bit(monkeypatch, format, path, dtype):
    shape, quantizer, lengths = LEAVES[path], FORMATS[format], []
    leaf = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    axis = slabs.free_axis(path, shape, quantizer)
    if axis is None:
        assert format == "int8 per tensor" and "stack" not in path
        return

    def encode(array):
        lengths.append(array.shape[axis])
        return jq.quantize_params({path: array}, quantizer)[path]

    monkeypatch.setattr(slabs, "_SLAB", leaf.nbytes // 7)
    codes = slabs.in_slabs(lambda: leaf, axis, encode)
    assert len(lengths) > 2 and min(lengths) > 1 and sum(lengths) == shape[axis]
    same(jax.tree.map(jnp.asarray, codes), jq.quantize_params({path: jnp.asarray(leaf)}, quantizer)[path])


WHOLE = {"gptq": jq.gptq(jq.int8), "least squares": jq.rtn(jq.int8, jq.least_squares), "a quantizer of one's own": None}


@dataclasses.dataclass(frozen=True)
class Own:
    format = jq.int8

    def __call__(self, w, stats):
        return jq.quantize(w, self.format)


@pytest.mark.parametrize("quantizer", WHOLE)
def test_a_quantizer_that_may_look_at_all_gets_the_whole(quantizer):
    assert slabs.free_axis("a/weight", (64, 64), WHOLE[quantizer] or Own()) is None


def test_an_error_in_a_slab_names_the_place_in_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(slabs, "_SLAB", 256)
    leaf = np.ones((64, 16), np.float32)
    leaf[50, 3] = np.nan
    write_container(tmp_path / "src.safetensors", {"a.weight": leaf}, {})
    with pytest.raises(NonFiniteError, match=r"a/weight\[50, 3\]"):
        jq.quantize_checkpoint(tmp_path / "src.safetensors", tmp_path / "q.safetensors")


PEAK = """
import re, sys
from pathlib import Path

import jax.numpy as jnp

import jaxquant as jq


def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])


jq.quantize(jnp.ones((64, 64)), jq.int8)
idle = peak()
jq.quantize_checkpoint(sys.argv[1], sys.argv[2], jq.int8)
print(peak() - idle)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_what_is_held_is_the_codes_and_little_beside_them(tmp_path):
    leaf = np.ones((16384, 4096), jnp.bfloat16)  # 134 MB; the whole in one piece takes five times that
    write_container(tmp_path / "src.safetensors", {"a.weight": leaf}, {})
    (held,) = found(started(PEAK, str(tmp_path / "src.safetensors"), str(tmp_path / "q.safetensors")))
    assert held < 1.5 * leaf.nbytes
