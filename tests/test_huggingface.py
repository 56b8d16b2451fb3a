"""Checkpoints of Hugging Face: what other packages wrote is read as they read it, and written as they write it.

`golden/*.safetensors` were made by the packages themselves (`golden/make_huggingface.py`): the tensors of a checkpoint,
the config beside it, and the weight that the package decodes.
"""

import dataclasses
import functools
import json
import os
import pathlib
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant import inputs
from jaxquant.errors import FileError
from jaxquant.files.container import open_container, write_container
from jaxquant.files.huggingface.compressed_tensors import save_compressed_tensors
from jaxquant.files.huggingface.folder import write_folder
from jaxquant.files.huggingface.gptq import save_gptq
from jaxquant.files.huggingface.load import load_safetensors
from jaxquant.files.huggingface.words import from_words, plus_one, to_words

HERE = pathlib.Path(__file__).parent / "golden"
STEM = "model.layers.0.mlp.up_proj."
# What each becomes, and who writes it again.
GOLDEN = {
    "gptq_v1": ("int4 g32", save_gptq),
    "gptq_v1_affine_act_order": ("int4 g32 affine permuted", None),  # we would write version 2
    "gptq_v2_2bit": ("int2 g32 affine", save_gptq),
    "gptq_v2_8bit": ("int8 per-channel affine", save_gptq),
    "awq": ("int4 g32 affine", None),
    "bnb_nf4": ("nf4 g64", None),
    "bnb_nf4_double": ("nf4 g64", None),
    "bnb_nf4_two_rows": ("nf4 g2", None),  # a range for 2 outputs
    "bnb_fp4": ("codebook4 g64", None),
    "bnb_int8": ("int8 per-channel", None),
    "ct_w4a16": ("int4 g32", save_compressed_tensors),
    "ct_w4a16_affine": ("int4 g32 affine", save_compressed_tensors),
    "ct_w8a16": ("int8 per-channel", save_compressed_tensors),
    "ct_w8a8": ("int8 per-channel", functools.partial(save_compressed_tensors, activations=jq.int8)),
    "ct_fp8": ("float8_e4m3fn per-tensor", functools.partial(save_compressed_tensors, activations=jq.fp8)),
}


@functools.cache
def golden(name: str):
    """The tensors of a golden checkpoint, its config, and the weight that its own package decodes."""
    container = open_container(HERE / f"{name}.safetensors")
    tensors = {key: container.read(key) for key in container.names}
    expected = tensors.pop("expected")
    return tensors, container.metadata["config"], expected


def put(folder: pathlib.Path, tensors, config) -> pathlib.Path:
    """Writes a checkpoint as strangers do, unchecked."""
    folder.mkdir(exist_ok=True)
    write_container(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def of(tree) -> jq.QTensor:
    return tree["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]


def read(folder: pathlib.Path, name: str) -> jq.QTensor:
    tensors, config, _ = golden(name)
    return of(load_safetensors(put(folder, tensors, config)))


def same(a, b) -> bool:
    """Whether two trees hold the same arrays, bit for bit, in the same structure."""
    equal = lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))  # noqa: E731
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(equal, a, b))


# Reading.


@pytest.mark.parametrize("name", GOLDEN)
def test_a_checkpoint_decodes_to_what_its_own_package_decodes(tmp_path, name):
    """Law: dequantize(load_safetensors(path)) is the package's own weight; its other arrays and its dtype are kept."""
    tensors, config, expected = golden(name)
    tree = load_safetensors(put(tmp_path, tensors, config))
    q, w = of(tree), np.asarray(jq.dequantize(of(tree)))
    assert q.description == GOLDEN[name][0] and w.dtype == expected.dtype == json.loads(config)["torch_dtype"]
    # LLM.int8() multiplies by SCB and then by 1 / 127; here their product, rounded once, is the scale.
    bound = 2 * np.finfo(np.float32).eps * np.abs(expected) if name == "bnb_int8" else 0
    assert np.all(np.abs(w.astype(np.float64) - expected.astype(np.float64)) <= bound)
    assert same(tree["model"]["norm"], {"weight": tensors["model.norm.weight"]})
    assert set(tree["model"]["layers"]["0"]["mlp"]["up_proj"]) == {"weight"}


@pytest.mark.parametrize("name", [name for name, (_, save) in GOLDEN.items() if save])
def test_a_checkpoint_written_again_is_the_one_its_own_package_wrote(tmp_path, name):
    """Law: save(load(path)) has the same tensors, bit for bit, and says the same of them."""
    tensors, config, _ = golden(name)
    tree = load_safetensors(put(tmp_path / "a", tensors, config))
    GOLDEN[name][1](tmp_path / "b", tree, {"torch_dtype": json.loads(config)["torch_dtype"], "hidden_size": 128})
    again = open_container(tmp_path / "b" / "model.safetensors")
    assert same({key: again.read(key) for key in again.names}, tensors)
    assert same(load_safetensors(tmp_path / "b"), tree)
    told, known = (json.loads(text) for text in ((tmp_path / "b" / "config.json").read_text(), config))
    assert told["hidden_size"] == 128 and told["torch_dtype"] == known["torch_dtype"]
    agree(told["quantization_config"], known["quantization_config"])


def agree(told: dict, known: dict) -> None:
    """Every value that both configs name is the same, but for what is not about the tensors."""
    for key in set(told) & set(known) - {"ignore", "version"}:
        if isinstance(told[key], dict):
            agree(told[key], known[key])
        elif known[key] is not None:
            assert told[key] == known[key], key


def test_act_order_survives_being_written(tmp_path):
    """Law: the codes of each input and its group come back, in version 2, which holds its zero points of 0."""
    tensors, _, _ = golden("gptq_v1_affine_act_order")
    q = read(tmp_path / "a", "gptq_v1_affine_act_order")
    save_gptq(tmp_path / "b", {"lm_head": {"weight": q}})
    container = open_container(tmp_path / "b" / "model.safetensors")
    for suffix in ("qweight", "g_idx", "scales"):
        assert same(container.read(f"lm_head.{suffix}"), tensors[STEM + suffix])
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert (config["desc_act"], config["checkpoint_format"], config["lm_head"]) == (True, "gptq_v2", True)
    assert same(load_safetensors(tmp_path / "b"), {"lm_head": {"weight": q}})


def test_compressed_tensors_groups_by_index(tmp_path):
    """Law: with weight_g_idx, w[o, i] = code * scale[o, g_idx[i]]; one that is all -1 was never filled in."""
    tensors, config, expected = golden("ct_w4a16")
    index = np.random.default_rng(0).permutation(np.arange(128) // 32).astype(np.int32)
    q = of(load_safetensors(put(tmp_path / "a", tensors | {STEM + "weight_g_idx": index}, config)))
    plain = of(load_safetensors(put(tmp_path / "b", tensors | {STEM + "weight_g_idx": 0 * index - 1}, config)))
    assert np.array_equal(jq.dequantize(plain), expected)
    w = np.asarray(plain.codes, np.float32) * np.asarray(plain.scale)[:, index]
    assert np.array_equal(jq.dequantize(q), w.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_float_checkpoint_in_shards_is_the_one_in_one_file(tmp_path, dtype):
    """Law: arrays keep their type and bits, whether a file, a folder or an index is named."""
    arrays = {f"model.layers.{i}.{name}.weight": np.full((2, 3), i + 0.5, dtype) for i in (0, 1) for name in "ab"}
    put(tmp_path / "one", arrays, {})
    names = list(arrays)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    (tmp_path / "many").mkdir()
    for part in set(places.values()):
        write_container(tmp_path / "many" / part, {n: arrays[n] for n in names if places[n] == part}, {})
    index = tmp_path / "many" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    one = load_safetensors(tmp_path / "one")
    assert one["model"]["layers"]["1"]["b"]["weight"].dtype == dtype
    for path in (tmp_path / "one" / "model.safetensors", tmp_path / "many", index):
        assert same(load_safetensors(path), one)


def test_settings_in_a_file_of_their_own(tmp_path):
    """Law: AutoGPTQ's quantize_config.json means what the config's quantization_config means."""
    tensors, config, expected = golden("gptq_v1")
    put(tmp_path, tensors, {})
    (tmp_path / "quantize_config.json").write_text(json.dumps(json.loads(config)["quantization_config"]))
    assert np.array_equal(jq.dequantize(of(load_safetensors(tmp_path))), expected)


# Words.


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 40), st.integers(1, 9), st.integers(0, 1), st.integers(0, 2**32 - 1))
def test_words_hold_fields_from_the_lowest_bits(width, count, others, axis, seed):
    """Law: word j is sum_i (code_(j n + i) + 2^(width - 1)) 2^(width i), along either axis, and gives them back."""
    half, n = 2 ** (width - 1), 32 // width
    codes = np.random.default_rng(seed).integers(-half, half, (others, count)).astype(np.int8)
    fields = [[int(c) + half for c in row] + [0] * (-count % n) for row in codes]
    expected = [
        [sum(f << width * i for i, f in enumerate(row[j : j + n])) for j in range(0, len(row), n)] for row in fields
    ]
    words = to_words(np.moveaxis(codes, 1, axis), width, axis)
    assert np.array_equal(np.moveaxis(words, axis, 1).view(np.uint32), np.array(expected, np.uint32))
    assert np.array_equal(np.moveaxis(from_words(words, width, axis), axis, 1)[:, :count], codes)
    ones = sum(1 << start for start in range(0, 32, width))
    more = [[(word + ones) % 2**32 for word in row] for row in expected]
    assert np.array_equal(np.moveaxis(plus_one(words, width), axis, 1).view(np.uint32), np.array(more, np.uint32))


# Writing.


def tree(format: jq.Format, rows: int = 32):
    """A small model in torch's layout: two linear layers, a float head, a norm and an embedding."""
    rng, columns = np.random.default_rng(1), 64
    w = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    block = {"q_proj": {"weight": w(rows, columns), "bias": w(rows)}, "norm": {"weight": w(columns)}}
    model = {"embed_tokens": {"weight": w(9, columns)}, "layers": {"0": block, "1": {"o_proj": {"weight": w(16, 32)}}}}
    where = lambda path, array: "proj" in path and array.ndim == 2  # noqa: E731
    return jq.quantize_params({"model": model}, format, where=where)


BOTH, ONE = (save_gptq, save_compressed_tensors), (save_compressed_tensors,)
WRITTEN = [
    (jq.int4(group=32), BOTH),
    (jq.int4(group=32, symmetric=False), BOTH),
    (jq.int8, BOTH),
    (jq.int8(symmetric=False), BOTH),
    (jq.int2(symmetric=False), (save_gptq,)),
    (jq.fp8, ONE),
    (jq.fp8(per_channel=False), ONE),
    (jq.int8, (functools.partial(save_compressed_tensors, activations=jq.int8),)),
    (jq.int8(per_channel=False), (functools.partial(save_compressed_tensors, activations=jq.int8),)),
    (jq.int4(group=16), (functools.partial(save_compressed_tensors, activations=jq.int8),)),
]
WRITTEN = [(format, save) for format, saves in WRITTEN for save in saves]


@pytest.mark.parametrize("format, save", WRITTEN)
def test_what_is_written_is_read_back(tmp_path, format, save):
    """Law: load_safetensors(save(tree)) is the tree: the same codes, scales in float32, zeros and dtype."""
    q = tree(format)
    save(tmp_path, q)
    assert same(load_safetensors(tmp_path), q)


@pytest.mark.parametrize("activations", [None, jq.int8])
def test_a_single_output_keeps_its_axis(tmp_path, activations):
    """Law: a scale [1, 1] of [1, inputs] is one for each output, not one for all."""
    q = tree(jq.int8(symmetric=False), rows=1)
    save_compressed_tensors(tmp_path, q, activations=activations)
    assert same(load_safetensors(tmp_path), q)
    assert '"strategy": "channel"' in (tmp_path / "config.json").read_text()


def test_a_config_names_what_is_in_which_format(tmp_path):
    """Law: weights of two formats are two groups of modules by name; float matrices and a tied head are left alone."""
    q = tree(jq.int4(group=32))
    other = q["model"]["layers"]["1"]["o_proj"]
    other["weight"] = jq.quantize(jq.dequantize(other["weight"]), jq.fp8, axis=-1)
    save_compressed_tensors(tmp_path, q, {"torch_dtype": "float32", "vocab_size": 9})
    config = json.loads((tmp_path / "config.json").read_text())
    groups, told = config["quantization_config"]["config_groups"].values(), config["quantization_config"]
    targets = {name: group["format"] for group in groups for name in group["targets"]}
    names = {"model.layers.0.q_proj": "pack-quantized", "model.layers.1.o_proj": "float-quantized"}
    assert targets == names and told["format"] == "mixed-precision"
    assert told["ignore"] == ["lm_head", "model.embed_tokens"] and config["vocab_size"] == 9
    back = load_safetensors(tmp_path)["model"]["layers"]["1"]["o_proj"]["weight"]
    assert back.dtype == jnp.float32 and same(back.astype(jnp.bfloat16), other["weight"])


def quantized(format: jq.Format = jq.int8, **changes) -> jq.QTensor:
    return dataclasses.replace(jq.quantize(jnp.ones((8, 32), jnp.float32), format, axis=-1), **changes)


TURN = inputs.Rotation(jnp.ones((1, 32), jnp.int8), jnp.zeros((1, 1), bool))
MIXED = {"a": {"weight": quantized()}, "b": {"weight": quantized(jq.int4)}}
CANNOT = {
    "three bits": (BOTH, {"x": {"weight": quantized(jq.int3)}}, r"x\.weight: .* int3 .*Quantize to those"),
    "nf4": (BOTH, {"x": {"weight": quantized(jq.nf4(group=32))}}, r"x\.weight: .* nf4 "),
    "rotated": (BOTH, {"x": {"weight": quantized(transform=(TURN,))}}, r"x\.weight: .*inputs first"),
    "a bound": (BOTH, {"x": {"weight": quantized(input_bound=jnp.ones((1, 1)))}}, r"x\.weight: .*fixed range"),
    "a stack": (BOTH, {"x": {"weight": jq.quantize(jnp.ones((2, 8, 8)))}}, r"x\.weight: .*not a matrix"),
    "a kernel": (BOTH, {"x": {"kernel": quantized()}}, r"x\.kernel: .*named `weight`"),
    "shared rows": (BOTH, {"x": {"weight": quantized(scale=jnp.ones((4, 1)))}}, r"x\.weight: .*per channel"),
    "one scale": (BOTH, {"x": {"weight": quantized(jq.int4(per_channel=False))}}, r"x\.weight: .*scale"),
    "a list": (BOTH, {"x": [quantized()]}, r"x/0: .*dicts"),
    "text": (BOTH, {"x": "text"}, r"x is a str"),
    "no codes": (BOTH, {"x": jnp.ones(3)}, "no QTensor"),
    "two formats": ((save_gptq,), MIXED, r"a\.weight is 8 bits.*b\.weight is 4 bits"),
    "float8": ((save_gptq,), {"x": {"weight": quantized(jq.fp8)}}, r"x\.weight: .*float8"),
    "odd outputs": ((save_gptq,), {"x": {"weight": jq.quantize(jnp.ones((3, 8)), axis=-1)}}, r"x\.weight: .*in a word"),
    "activations": (
        (functools.partial(save_compressed_tensors, activations=jq.fp8),),
        {"x": {"weight": quantized()}},
        r"x\.weight: activations=float8",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_a_layout_cannot_hold_is_refused_by_name(tmp_path, case):
    """Law: nothing is rounded, dropped or half written: an error names the path."""
    saves, wrong, message = CANNOT[case]
    for save in saves:
        with pytest.raises(FileError, match=message):
            save(tmp_path / "new", wrong)
        assert not (tmp_path / "new").exists()


def test_act_order_has_no_place_in_compressed_tensors(tmp_path):
    """Law: its newest version has none; the error names the writer that has."""
    q = read(tmp_path, "gptq_v1_affine_act_order")
    with pytest.raises(FileError, match=r"x\.weight: .*save_gptq"):
        save_compressed_tensors(tmp_path / "new", {"x": {"weight": q}})


def test_a_checkpoint_is_not_mixed_with_another(tmp_path):
    """Law: a folder that holds tensors is left as it is."""
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FileError, match=r"already: write to a new folder"):
        save_gptq(tmp_path, {"x": {"weight": quantized()}})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors.index.json"]


@pytest.mark.parametrize("shard_bytes", [0, 1500, 2500, 10**9])
@pytest.mark.parametrize("format, save", WRITTEN[:4])
def test_what_is_written_in_shards_is_read_back(tmp_path, format, save, shard_bytes):
    """Law: the same tensors, bit for bit, in files of that size or of one weight, which the index names."""
    q = tree(format)
    save(tmp_path / "one", q, {"vocab_size": 9})
    save(tmp_path / "many", q, {"vocab_size": 9}, shard_bytes=shard_bytes)
    one = open_container(tmp_path / "one" / "model.safetensors")
    assert same(load_safetensors(tmp_path / "many"), q)
    assert (tmp_path / "many" / "config.json").read_bytes() == (tmp_path / "one" / "config.json").read_bytes()
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"] and len(list((tmp_path / "many").iterdir())) == 2
        return
    assert len(files) > 1 and len(list((tmp_path / "many").iterdir())) == len(files) + 2
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(one.read(name).nbytes for name in one.names)
    shards = {file: open_container(tmp_path / "many" / file) for file in files}
    assert {name: file for file in files for name in shards[file].names} == index["weight_map"]
    assert same(
        {n: shards[file].read(n) for n, file in index["weight_map"].items()}, {n: one.read(n) for n in one.names}
    )
    for shard in shards.values():
        stems = {name.rpartition(".")[0] for name in shard.names}
        assert len(stems) == 1 or sum(shard.read(name).nbytes for name in shard.names) <= shard_bytes


@pytest.mark.parametrize("format", [jq.int4(group=32), jq.int4(group=32, symmetric=False)])
def test_transformers_layout_of_shards_is_what_safetensors_reads(tmp_path, format):
    """The package itself reads each file, and finds in it what the index says."""
    save_gptq(tmp_path, tree(format), shard_bytes=1500)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(index.values()):
        with safetensors.safe_open(tmp_path / file, framework="numpy") as found:
            assert set(found.keys()) == {name for name, place in index.items() if place == file}
            assert found.metadata() == {"format": "pt"}


@pytest.mark.parametrize("save", BOTH)
@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_disk_that_is_full_leaves_no_checkpoint(tmp_path, monkeypatch, save, after):
    """Law: until the last file has its name there is none, and what was written is gone."""
    calls = []

    def fails(source, target):
        calls.append(target)
        if len(calls) > after:
            raise OSError("no space left")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, tree(jq.int8), shard_bytes=1500)
    monkeypatch.undo()
    assert [path for path in tmp_path.iterdir() if path.name != "config.json"] == []
    save(tmp_path, tree(jq.int8), shard_bytes=1500)
    assert same(load_safetensors(tmp_path), tree(jq.int8))


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    """Law: when a weight of a shard is made, those of the shards before are gone."""
    made: list[weakref.ref] = []

    def leaves():
        for i in range(12):
            assert sum(earlier() is not None for earlier in made) <= 3
            array = np.full(250, i, np.float32)
            made.append(weakref.ref(array))
            yield {f"{i}.weight": array}
            del array

    write_folder(tmp_path, leaves(), {}, 3000)
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))][-1] == "model-00004-of-00004.safetensors"
    assert np.all(load_safetensors(tmp_path)["11"]["weight"] == 11)


def test_a_name_in_two_shards_is_refused(tmp_path):
    codes = quantized(jq.int4)
    with pytest.raises(FileError, match=r"'x\.weight_scale' would be there twice"):
        save_compressed_tensors(tmp_path, {"x": {"weight": codes, "weight_scale": jnp.ones(3)}}, shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


# Strangers.


def without(suffix):
    return lambda tensors, config: tensors.pop(STEM + suffix)


def changed(suffix, change):
    return lambda tensors, config: tensors.update({STEM + suffix: change(tensors[STEM + suffix].copy())})


def told(**values):
    return lambda tensors, config: config["quantization_config"].update(values)


def at(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def state(**values):
    def change(array):
        return np.frombuffer(json.dumps(json.loads(array.tobytes()) | values).encode(), np.uint8)

    return changed("weight.quant_state.bitsandbytes__nf4", change)


WEIGHTS = {"num_bits": 4, "type": "int"}
HOSTILE = [
    ("gptq_v1", told(bits=-4), "'bits' is -4: it can be 2, 4, 8"),
    ("gptq_v1", told(bits=3), "'bits' is 3"),
    ("gptq_v1", told(bits=True), "'bits' is True"),
    ("gptq_v1", told(bits=4.0), "'bits' is 4.0"),
    ("gptq_v1", told(bits=10**4000), "'bits' is 1000"),
    ("gptq_v1", told(bits=[4]), r"'bits' is \[4\]"),
    ("gptq_v1", told(group_size=0), "'group_size' is 0"),
    ("gptq_v1", told(group_size=-7), "'group_size' is -7"),
    ("gptq_v1", told(group_size=2**70), "'group_size' is 11805"),
    ("gptq_v1", told(group_size=48), "up_proj.qweight' has 128 inputs, which groups of 48 do not divide"),
    ("gptq_v1", told(group_size=64), r"up_proj.scales' has shape \(4, 32\), not \(2, 32\)"),
    ("gptq_v1", told(checkpoint_format="marlin"), "'checkpoint_format' is 'marlin': it can be 'gptq', 'gptq_v2'"),
    ("gptq_v1", told(is_marlin_format=True), "'is_marlin_format' is True"),
    ("gptq_v1", told(dynamic={"+:x": {"bits": 8}}), "'dynamic' is"),
    ("gptq_v1", told(dynamic=[]), r"'dynamic' is \[\]: it is an object"),
    ("gptq_v1", told(quant_method="fp8"), "'quant_method' is 'fp8': it can be 'gptq', 'awq', 'bitsandbytes', 'comp"),
    ("gptq_v1", lambda t, c: c.update(quantization_config=[]), r"'quantization_config' is \[\]: it is an object"),
    ("gptq_v1", lambda t, c: c.pop("quantization_config"), "up_proj.qweight' holds codes"),
    ("gptq_v1", lambda t, c: c.update(torch_dtype="float7"), "'torch_dtype' is 'float7'"),
    ("gptq_v1", without("qweight"), "up_proj.qweight' is missing, which belongs to .*up_proj.g_idx"),
    ("gptq_v1", without("scales"), "up_proj.scales' is missing"),
    ("gptq_v1", without("qzeros"), "up_proj.qzeros' is missing"),
    ("gptq_v1", changed("scales", at((1, 2), np.nan)), r"up_proj.scales' is nan at \[1, 2\]"),
    ("gptq_v1", changed("scales", at((0, 0), np.inf)), r"up_proj.scales' is inf"),
    ("gptq_v1", changed("scales", lambda a: a.astype(np.int32)), "up_proj.scales' is of type int32"),
    ("gptq_v1", changed("qzeros", lambda a: a[:, :3]), r"up_proj.qzeros' has shape \(4, 3\), not \(4, 4\)"),
    ("gptq_v1", changed("qweight", lambda a: a.view(np.uint32)), "up_proj.qweight' is of type uint32"),
    ("gptq_v1", changed("qweight", lambda a: a[:0]), "up_proj.qweight' is empty"),
    ("gptq_v1", changed("qweight", lambda a: a[0]), r"up_proj.qweight' has shape \(32,\)"),
    ("gptq_v1", changed("g_idx", at(3, 4)), "up_proj.g_idx' names the groups 0 to 4, where there are 4"),
    ("gptq_v1", changed("g_idx", at(3, -2)), "up_proj.g_idx' names the groups -2"),
    ("gptq_v1", changed("g_idx", at(3, 1)), "up_proj.g_idx' puts 31 to 33 inputs in a group, not 32"),
    ("gptq_v1", changed("g_idx", lambda a: a[1:]), r"up_proj.g_idx' has shape \(127,\)"),
    ("gptq_v1", lambda t, c: t.update({STEM + "weight": np.ones(3, np.int8)}), "up_proj.weight' is there beside"),
    ("gptq_v1", lambda t, c: t.update({STEM + "weight.x": np.ones(3, np.int8)}), "weight.x' has the name of another"),
    ("awq", told(bits=8), "'bits' is 8: it can be 4"),
    ("awq", told(version="gemv"), "'version' is 'gemv'"),
    ("awq", told(group_size=48), r"up_proj.qweight' is \(128, 4\), .* groups of 48"),
    ("awq", without("qzeros"), "up_proj.qzeros' is missing"),
    ("awq", changed("scales", at((0, 0), -np.inf)), "up_proj.scales' is -inf"),
    ("bnb_nf4", without("weight"), "up_proj.weight' is missing"),
    ("bnb_nf4", without("weight.absmax"), "up_proj.weight.absmax' is missing"),
    ("bnb_nf4", without("weight.quant_map"), "up_proj.weight.quant_map' is missing"),
    ("bnb_nf4", without("weight.quant_state.bitsandbytes__nf4"), "bitsandbytes__nf4' is missing"),
    ("bnb_nf4", state(shape=[32, 2**70]), "up_proj.weight' has 2048 bytes"),
    ("bnb_nf4", state(shape=[-32, -128]), r"'shape' is \[-32, -128\]"),
    ("bnb_nf4", state(shape={}), "'shape' is {}"),
    ("bnb_nf4", state(shape=[128, 32], blocksize=48), "'blocksize' is 48: blocks would cut the rows"),
    ("bnb_nf4", state(blocksize=0), "'blocksize' is 0"),
    ("bnb_nf4", state(blocksize=-1), "'blocksize' is -1"),
    ("bnb_nf4", state(blocksize=128), r"up_proj.weight.absmax' has shape \(64,\), not \(32\)"),
    ("bnb_nf4", changed("weight.quant_state.bitsandbytes__nf4", lambda a: a[:9]), "bitsandbytes__nf4' is not JSON"),
    ("bnb_nf4", changed("weight.quant_state.bitsandbytes__nf4", lambda a: a[:1] * 0 + 49), "is a JSON int"),
    ("bnb_nf4_double", state(nested_blocksize=0), "'nested_blocksize' is 0"),
    ("bnb_nf4_double", state(nested_offset="x"), "'nested_offset' is 'x'"),
    ("bnb_nf4_double", state(nested_offset=1e39), "'nested_offset' is 1e"),
    ("bnb_nf4_double", without("weight.nested_quant_map"), "nested_quant_map' is missing"),
    ("bnb_nf4_double", without("weight.nested_absmax"), "up_proj.weight.absmax' is of type uint8"),
    ("bnb_int8", changed("weight_format", lambda a: np.array(1, np.uint8)), "up_proj.weight_format' is not 0"),
    ("bnb_int8", without("SCB"), "up_proj.SCB' is missing"),
    ("ct_w4a16", told(format="nvfp4-pack-quantized"), "'format' is 'nvfp4-pack-quantized': it can be 'pack-quant"),
    ("ct_w4a16", told(format="marlin-24"), "'format' is 'marlin-24'"),
    ("ct_w4a16", told(sparsity_config={"format": "sparse-24-bitmask"}), "'format' is 'sparse-24-bitmask'"),
    ("ct_w4a16", told(transform_config={"config_groups": {}}), "'transform_config' is"),
    ("ct_w4a16", told(config_groups=[]), r"'config_groups' is \[\]: it is an object"),
    ("ct_w4a16", told(config_groups={"g": 3}), "'g' is 3: it is an object"),
    ("ct_w4a16", told(config_groups={"g": {"weights": WEIGHTS | {"num_bits": 5}}}), "'num_bits' is 5"),
    ("ct_w4a16", told(config_groups={"g": {"weights": WEIGHTS | {"type": "float"}}}), "'num_bits' is 4: it can be 8"),
    ("ct_w4a16", told(config_groups={"g": {"weights": WEIGHTS | {"num_bits": 8}}}), "weight_packed' is"),
    ("ct_w4a16", without("weight_packed"), "up_proj.weight_packed' is missing"),
    ("ct_w4a16", without("weight_shape"), "up_proj.weight_shape' is missing"),
    ("ct_w4a16", without("weight_scale"), "up_proj.weight_scale' is missing"),
    ("ct_w4a16", changed("weight_shape", at(0, 2**62)), "up_proj.weight_packed' is"),
    ("ct_w4a16", changed("weight_shape", at(1, -128)), "up_proj.weight_packed' is"),
    ("ct_w4a16", changed("weight_shape", lambda a: a[:0]), "up_proj.weight_packed' is"),
    ("ct_w4a16", changed("weight_scale", lambda a: a[:, :3]), r"up_proj.weight_scale' is \(32, 3\)"),
    ("ct_w4a16", changed("weight_scale", at((0, 0), np.nan)), "up_proj.weight_scale' is nan"),
    ("ct_w4a16_affine", changed("weight_zero_point", lambda a: a[:3]), r"weight_zero_point' has shape \(3, 4\)"),
    ("ct_w8a8", without("weight"), "up_proj.weight' is missing"),
    ("ct_w8a8", changed("weight", lambda a: a.astype(np.float32)), "up_proj.weight' is of type float32"),
    ("ct_w8a8", changed("weight_scale", lambda a: a[:0]), r"up_proj.weight_scale' is \(0, 1\)"),
    (
        "ct_w8a8",
        lambda t, c: t.update({STEM + "weight_zero_point": np.zeros((5, 1), np.int8)}),
        r"up_proj.weight_zero_point' has shape \(5, 1\)",
    ),
    (
        "ct_fp8",
        lambda t, c: t.update({STEM + "weight_zero_point": np.ones(1, np.int8)}),
        "up_proj.weight_zero_point' is int8 and not 0, where codes are float8_e4m3fn",
    ),
]


@pytest.mark.parametrize("name, spoil, message", HOSTILE, ids=[f"{n}-{m[:40]}" for n, _, m in HOSTILE])
def test_what_strangers_write_is_not_believed(tmp_path, name, spoil, message):
    """Law: a checkpoint that contradicts itself is a FileError that names the tensor or the key, and the value."""
    tensors, config, _ = golden(name)
    tensors, config = dict(tensors), json.loads(config)
    spoil(tensors, config)
    with pytest.raises(FileError, match=message):
        load_safetensors(put(tmp_path, tensors, config))


# Act-order: inputs that are permuted.

K, N = 48, 12


def permuted(axis: int = 0, blocks: int = 1):
    """A weight in groups of 16 inputs that lie in another order, in each of `blocks`; and its decoded array."""
    rng = np.random.default_rng(2)
    order = np.concatenate([rng.permutation(K // blocks) for _ in range(blocks)]).astype(np.int32)
    codes = rng.integers(-7, 8, (K, N)).astype(np.int8)
    scale = (2.0 ** rng.integers(-2, 3, (3, N))).astype(np.float32)
    w, place = np.empty((K, N), np.float32), order + np.repeat(np.arange(blocks) * (K // blocks), K // blocks)
    w[place] = codes * np.repeat(scale, 16, 0)
    labels = np.tile(np.arange(K // blocks, dtype=np.int32), blocks)
    parts = [np.moveaxis(part, 0, axis) for part in (labels[:, None], order[:, None], np.zeros((blocks, 1), bool))]
    codes, scale = (np.moveaxis(part, 0, axis) for part in (codes, scale))
    step = inputs.Permutation(*map(jnp.asarray, parts))
    q = jq.QTensor(jnp.asarray(codes, jnp.int4), jnp.asarray(scale), None, jnp.dtype("float32"), 4, transform=(step,))
    return q, np.moveaxis(w, 0, axis)


def whole(*shape: int) -> jax.Array:
    """Whole numbers up to 127, which int8 activations hold exactly."""
    x = np.random.default_rng(3).integers(-126, 127, shape).astype(np.float32)
    x[..., 0] = 127
    return jnp.asarray(x)


@pytest.mark.parametrize("axis, blocks", [(0, 1), (0, 3), (1, 1), (1, 3)])
def test_a_permutation_brings_inputs_to_their_codes(axis, blocks):
    """Law: T x has the inputs in the order of the codes, T^T puts the rows of the weight back, T^T T = 1."""
    q, w = permuted(axis, blocks)
    (step,) = q.transform
    assert np.array_equal(jq.dequantize(q), w) and q.description == "int4 g16 permuted"
    assert q.blocks == ((K // blocks, 1) if axis == 0 else (1, K // blocks))
    upright = jax.tree.map(lambda part: jnp.moveaxis(part, axis, 0)[None], step)
    x = whole(1, 5, K)
    found, turn = jax.jit(lambda step, x, eye: (step.apply(x), step.adjoint(eye)[0]))(
        upright, x, jnp.eye(K, dtype=x.dtype)[None]
    )
    turn = np.asarray(turn)
    assert np.array_equal(found[0], np.asarray(x)[0] @ turn)
    assert np.array_equal(turn @ turn.T, np.eye(K)) and not np.array_equal(turn, np.eye(K))
    idle = upright.identity()
    assert np.array_equal(jax.jit(lambda step, x: step.apply(x))(idle, x), x)
    assert jax.tree.structure(idle) == jax.tree.structure(upright)


SPLIT = (3, 16)
# Those that stay in codes, and one that cuts through what is permuted.
VIEWS = {
    "matmul": lambda w, x: x @ w,
    "transposed": lambda w, x: (w.T @ x.T).T,
    "columns": lambda w, x: jnp.pad(x @ w[:, 3:9], ((0, 0), (3, 3))),
    "heads of outputs": lambda w, x: jnp.tensordot(x, w.reshape(K, 3, 4), 1).reshape(-1, N),
    "heads of inputs": lambda w, x: jnp.einsum("thd,hdn->tn", x.reshape(-1, *SPLIT), w.reshape(*SPLIT, N)),
    "swapped": lambda w, x: jnp.einsum(
        "tdh,dhn->tn", jnp.swapaxes(x.reshape(-1, *SPLIT), 1, 2), jnp.swapaxes(w.reshape(*SPLIT, N), 0, 1)
    ),
    "rows": lambda w, x: x[:, 16:] @ w[16:],
}


@pytest.mark.parametrize("rows, activations", [(1, None), (5, jq.int8)], ids=["float", "int8"])
def test_permuted_inputs_follow_views(rows, activations):
    """Law: quantized(f)(q, x) is f(dequantize(q), x), exact with power-of-two scales and whole inputs."""
    (q, w), x = permuted(), whole(rows, K)
    run = lambda q, x: {view: fn(q, x) for view, fn in VIEWS.items()}  # noqa: E731
    found = jax.jit(jq.quantized(run, activations=activations))(q, x)
    expected = {view: fn(jnp.asarray(w), x) for view, fn in VIEWS.items()}
    assert [view for view in VIEWS if not np.array_equal(found[view], expected[view])] == []
    assert jq.explain(VIEWS["swapped"], q, x).unmet == ()


def test_permuted_inputs_of_a_stack():
    """Law: a stack of permuted weights scans, indexes and differentiates as its decoded array does."""
    pairs = [permuted(), permuted(blocks=3)]
    pairs = [(dataclasses.replace(q, transform=(_merged(q.transform[0]),)), w) for q, w in pairs]
    qs = jax.tree.map(lambda *parts: jnp.stack(parts), *(q for q, _ in pairs))
    ws, x = np.stack([w for _, w in pairs]), whole(5, K)
    scan = lambda ws, x: jax.lax.scan(lambda carry, w: (carry, x @ w), 0, ws)[1]  # noqa: E731
    index = lambda ws, x: x @ ws[1]  # noqa: E731
    grad = lambda ws, x: jax.grad(lambda x: jnp.sum(x @ ws[1]))(x)  # noqa: E731
    for fn in (scan, index, grad):
        found = jax.jit(jq.quantized(fn, activations=None))(qs, x)
        assert np.array_equal(found, fn(jnp.asarray(ws), x))
    assert np.array_equal(jq.dequantize(qs[1]), ws[1])


def _merged(step: inputs.Permutation) -> inputs.Permutation:
    """The same permutation as one block, so that two of them stack."""
    blocks = step.seams.shape[0]
    shift = jnp.repeat(jnp.arange(blocks, dtype=jnp.int32) * (K // blocks), K // blocks)[:, None]
    return inputs.Permutation(step.inputs + shift, step.codes + shift, step.seams[:1])
