"""`save` and `load`: what comes back is what was written, or an error that says what is wrong."""

import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, normal
from tables import SAMPLE

import jaxquant as jq
from jaxquant.errors import ChecksumError, FileError
from jaxquant.files.container import open_container, write_container
from jaxquant.files.load import seal
from jaxquant.files.packing import packed, packed_size, unpacked

ROOT = Path(__file__).parent.parent


def same(a, b):
    """Equal trees: structure, types, and every bit."""
    (left, treedef), (right, other) = jax.tree.flatten(a), jax.tree.flatten(b)
    assert treedef == other
    for x, y in zip(left, right, strict=True):
        if not hasattr(x, "dtype"):
            assert x == y and type(x) is type(y)
            continue
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def there_and_back(path, tree, **options):
    jq.save(path, tree, **options)
    return jq.load(path)


# The law of packing


@given(st.integers(1, 8), st.integers(0, 200), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_codes_are_a_stream_of_bits(width, size, random):
    codes = np.array([random.randrange(-(2 ** (width - 1)), 2 ** (width - 1)) for _ in range(size)], np.int8)
    stream = packed(codes, width)
    bits = np.unpackbits(codes.view(np.uint8)[:, None], axis=1, bitorder="little")[:, :width]
    np.testing.assert_array_equal(stream, np.packbits(bits, bitorder="little"))
    assert stream.size == packed_size(size, width)
    np.testing.assert_array_equal(unpacked(stream, width, size), codes)


def test_long_streams():
    """Longer than what is packed at a time."""
    for width, size in ((3, 2**16 + 5), (4, 2**17)):
        codes = np.random.default_rng(0).integers(-(2 ** (width - 1)), 2 ** (width - 1), size).astype(np.int8)
        np.testing.assert_array_equal(unpacked(packed(codes, width), width, size), codes)


# What comes back


def test_every_kind_of_format(tmp_path):
    qs = {name: jq.quantize(normal(2, 32, 16), format) for name, format in SAMPLE.items()}
    matrices = {name: jq.quantize(normal(32, 16), format) for name, format in SAMPLE.items()}
    tree = {"upright": qs, "turned": jq.turned(qs), "in bytes": jq.turned(matrices)}
    same(there_and_back(tmp_path / "q.safetensors", tree), tree)


def test_codes_take_their_bits_on_disk(tmp_path):
    for format, bits in ((jq.int8, 8), (jq.int4, 4), (jq.int3, 3), (jq.int2, 2), (jq.nf4(group=None), 4)):
        jq.save(tmp_path / "q", jq.quantize(normal(256, 64), format))
        codes = open_container(tmp_path / "q").tensors["codes"]
        assert codes.stop - codes.start == 256 * 64 * bits // 8


def test_every_bundle(tmp_path):
    w = {"kernel": normal(32, 16)}
    stats = jq.calibrate(lambda w, x: x @ w["kernel"], w, [normal(64, 32)], gram=True)
    affine = jq.int4(group=8, symmetric=False)
    for quantizer in (jq.awq(jq.rtn(affine)), jq.rotated(jq.outliers(jq.int4, block=16)), jq.smoothquant(jq.int8)):
        q = jq.quantize_params(w, quantizer, stats=stats)
        same(there_and_back(tmp_path / "q", q), q)
    base = jq.double_quantize(jq.quantize_params(w, jq.nf4(group=8)))
    adapted = jq.add_lora(base, 2, key=jax.random.key(0))
    same(there_and_back(tmp_path / "q", adapted), adapted)
    learned = [jq.learn_steps(w, affine), jq.learn_clips(w, jq.int4)]
    same(there_and_back(tmp_path / "q", learned), learned)


def test_every_leaf(tmp_path):
    tree = {
        "none": None,
        "empty": [{}, [], ()],
        "numbers": (True, 3, 1.5, "text"),
        "by number": {0: jnp.arange(3), 7: jnp.float32(2)},
        "keys": [jax.random.key(3), jax.random.PRNGKey(3), jax.random.split(jax.random.key(1, impl="rbg"), 2)],
        "narrow": [jnp.arange(5).astype(dtype) for dtype in (jnp.int4, jnp.uint4, jnp.int2, jnp.uint2)],
        "floats": [jnp.ones((2, 1), d) for d in (jnp.bfloat16, jnp.float16, jnp.float8_e5m2, jnp.float8_e4m3b11fnuz)],
        "nothing": jnp.zeros((0, 4)),
        "wide": [np.arange(3.0), np.arange(3), np.ones(2, complex)],
        "strided": np.arange(12, dtype=np.int32).reshape(3, 4).T[::2],
    }
    back = there_and_back(tmp_path / "tree", tree)
    same(back, tree)
    assert isinstance(back["wide"][0], np.ndarray)  # JAX would make it float32


def test_one_array_on_two_paths_is_written_once(tmp_path):
    q = jq.quantize(normal(64, 32))
    back = there_and_back(tmp_path / "q", {"head": q, "embedding": q})
    assert back["head"].codes is back["embedding"].codes
    assert (tmp_path / "q").stat().st_size < 64 * 32 + 4 * 32 + 2000


def test_names_that_meet(tmp_path):
    tree = {"a/b": normal(2), "a": {"b": normal(3), "b'": normal(1)}}
    same(there_and_back(tmp_path / "tree", tree), tree)


@pytest.mark.parametrize("name", ("nnx_mlp", "equinox_mlp"))
def test_nodes_of_frameworks_come_back_through_like(tmp_path, name):
    model = MODELS[name]()
    params = eqx.filter(model.params, eqx.is_array)
    qparams = jq.quantize_params(params, jq.int4(group=8))
    jq.save(tmp_path / "q", qparams)
    for like in (params, qparams, jax.eval_shape(lambda: params)):
        same(jq.load(tmp_path / "q", like=like), qparams)
    assert type(jq.load(tmp_path / "q")) is dict


def test_like_says_what_differs(tmp_path):
    jq.save(tmp_path / "q", {"a": normal(2), "b": normal(3)})
    with pytest.raises(FileError, match=r"lacks \['c'\] and has \['b'\] more"):
        jq.load(tmp_path / "q", like={"a": normal(2), "c": normal(3)})
    with pytest.raises(FileError, match=r"b has the shape \(3,\), and \(4,\) in `like`"):
        jq.load(tmp_path / "q", like={"a": normal(2), "b": normal(4)})


def test_metadata(tmp_path):
    about = {"step": 3, "format": "int4 g64", "nested": {"list": [1, None]}}
    jq.save(tmp_path / "q", {}, about)
    assert jq.load_metadata(tmp_path / "q") == about
    assert jq.load(tmp_path / "q") == {}
    with pytest.raises(TypeError):
        jq.save(tmp_path / "q", {"w": normal(2)}, {"array": normal(2)})
    assert jq.load(tmp_path / "q") == {}


def test_leaves_that_have_no_place(tmp_path):
    for tree, says in (
        ({"a": {"f": len}}, "a/f: builtin.*eqx.filter"),
        ({("a",): 1}, "is neither text nor a whole number"),
        ({"a": {"b": 1, 2: 3}}, r"a: its keys \['b', 2\] are .* which JAX cannot sort"),
    ):
        with pytest.raises(FileError, match=says):
            jq.save(tmp_path / "q", tree)
    assert not list(tmp_path.iterdir())


# Many files


def parts(folder):
    return sorted(path.name for path in folder.iterdir())


def test_large_trees_lie_in_many_files_and_old_ones_go(tmp_path):
    tree = {f"w{i}": jq.quantize(normal(64, 96, seed=i)) for i in range(5)}
    same(there_and_back(tmp_path / "q.safetensors", tree, shard_bytes=10_000), tree)
    first = parts(tmp_path)
    assert len(first) == 5 and all(name.startswith("q") for name in first)
    jq.save(tmp_path / "q.safetensors", tree, shard_bytes=10_000)
    assert parts(tmp_path) == first  # the same tree has the same names
    tree["w4"] = normal(48, 48)
    same(there_and_back(tmp_path / "q.safetensors", tree, shard_bytes=10_000), tree)
    assert len(set(first) & set(parts(tmp_path))) == 4
    (tmp_path / "q-unrelated.safetensors").touch()
    jq.save(tmp_path / "q.safetensors", {})
    assert parts(tmp_path) == ["q-unrelated.safetensors", "q.safetensors"]


@pytest.mark.parametrize("file", ("../out.safetensors", "/etc/passwd", "", "gone.safetensors", "link.safetensors"))
def test_a_shard_outside_of_the_folder_is_not_opened(tmp_path, file):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "q.safetensors"
    write_container(tmp_path / "out.safetensors", {"w": np.zeros(4, np.float32)}, {})
    (tmp_path / "in" / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    entry = {"dtype": "float32", "shape": [4], "width": None, "sha256": "", "file": file}
    described = {"version": 1, "tree": {"array": "w"}, "tensors": {"w": entry}, "metadata": {}}
    write_container(path, {}, {"jaxquant": seal(json.dumps(described))})
    with pytest.raises(FileError, match=r"outside|not a plain name|missing|no tensor 'w'"):
        jq.load(path)
    jq.save(path, {})  # and it is not removed either
    assert (tmp_path / "out.safetensors").exists()


# What is damaged


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "q.safetensors"
    tree = {"w": jq.quantize(normal(8, 2), jq.int4(group=4, symmetric=False)), "b": normal(2).astype(jnp.bfloat16)}
    jq.save(path, tree, {"note": "x"})
    return path.read_bytes()


def test_a_bit_flipped_anywhere_is_found(tmp_path, written):
    data = written
    path = tmp_path / "q.safetensors"
    data_start = 8 + int.from_bytes(data[:8], "little")
    for place in (*range(0, data_start, 3), *range(data_start, len(data))):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        with pytest.raises(ChecksumError if place >= data_start else FileError) as error:
            jq.load(path)
        if place >= data_start:
            assert any(name in str(error.value) for name in ("'b'", "'w/codes'", "'w/scale'", "'w/zero'"))


def test_a_file_cut_short_is_found(tmp_path, written):
    data = written
    for sixteenth in range(16):
        (tmp_path / "q").write_bytes(data[: len(data) * sixteenth // 16])
        with pytest.raises(FileError):
            jq.load(tmp_path / "q")


def container(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(dtype="U8", shape="[2]", offsets="[0, 2]"):
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}'


HOSTILE = {
    "nothing": (b"", "first 8 bytes"),
    "no header": (container("", length=0), "not JSON"),
    "a header of 2^63": (container("{}", length=2**63), "first 8 bytes"),
    "a header of 2^64 - 1": (container("{}", length=2**64 - 1), "first 8 bytes"),
    "a header beyond the file": (container("{}", length=3), "first 8 bytes"),
    "no UTF-8": (container(b"\xff\xfe{}"), "not JSON"),
    "no JSON": (container("{'a': 1}"), "not JSON"),
    "no object": (container("[1, 2]"), "JSON list"),
    "nested": (container("[" * 100_000), "not JSON"),
    "nested objects": (container('{"a":' * 100_000), "not JSON"),
    "twice": (container(f'{{"a": {tensor()}, "a": {tensor()}}}', b"ab"), "a more than once"),
    "overlapping": (container(f'{{"a": {tensor()}, "b": {tensor()}}}', b"ab"), "offset"),
    "reversed": (container(f'{{"a": {tensor(offsets="[2, 0]")}}}', b"ab"), "offset"),
    "negative offsets": (container(f'{{"a": {tensor(offsets="[-2, 0]")}}}', b"ab"), "integer `-2`"),
    "a gap": (container(f'{{"a": {tensor(offsets="[1, 3]")}}}', b"abc"), "offset"),
    "out of the file": (container(f'{{"a": {tensor(offsets="[0, 2]")}}}', b"a"), "incomplete|cover"),
    "bytes left over": (container(f'{{"a": {tensor()}}}', b"abc"), "incomplete|cover"),
    "a product that overflows": (
        container(f'{{"a": {tensor(shape="[4194305, 4194305, 211106198978564]")}}}', b"ab"),
        "overflow",
    ),
    "a negative size": (container(f'{{"a": {tensor(shape="[-2]")}}}', b"ab"), "integer `-2`"),
    "bytes that do not fit": (container(f'{{"a": {tensor(dtype="F32")}}}', b"ab"), "shape"),
    "an unknown type": (container(f'{{"a": {tensor(dtype="X9")}}}', b"ab"), "X9"),
    "numbers as texts": (container(f'{{"__metadata__": {{"x": 1}}, "a": {tensor()}}}', b"ab"), "integer `1`"),
    "a pickle": (b"\x80\x04\x95\x15\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94", "first 8 bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_containers(tmp_path, case):
    data, says = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    for read in (jq.load, open_container):
        with pytest.raises(FileError, match=says) as error:
            read(path)
        assert str(path) in str(error.value)


def codes_of(**changes):
    """The description of an int4 QTensor of 4 x 2 with something wrong in it."""
    fields = {
        "codes": {"array": "codes"},
        "scale": {"array": "scale"},
        "zero": {"value": None},
        "dtype": {"dtype": "float32"},
        "bits": {"value": 4},
        "levels": {"value": None},
        "transform": {"tuple": []},
        "kept": {"value": None},
        "input_bound": {"value": None},
        "master": {"value": None},
    }
    return {"class": "QTensor", "fields": fields | changes}


DESCRIPTIONS = {
    "an unknown node": {"set": []},
    "more beside a node": {"value": 1, "list": []},
    "a class of somebody": {"class": "Popen", "fields": {"args": {"value": "ls"}}},
    "a field too many": codes_of(extra={"value": 1}),
    "an array that is not there": {"array": "nowhere"},
    "a dtype that is not there": {"dtype": "float12"},
    "a dtype of objects": {"dtype": "O"},
    "a key that is none": {"key": "sha1", "data": {"array": "codes"}},
    "a dict without keys": {"dict": [["a"]]},
    "bits of another width": codes_of(bits={"value": 8}),
    "bits that are text": codes_of(bits={"value": "4"}),
    "codes that are text": codes_of(codes={"value": "4"}),
    "a scale that is text": codes_of(scale={"value": "1"}),
    "a scale that does not divide": codes_of(scale={"array": "three"}),
    "a zero of another rank": codes_of(zero={"array": "flat"}),
    "levels too few": codes_of(levels={"tuple": [{"value": 1.0}]}),
    "a transform that is none": codes_of(transform={"tuple": [{"value": "rotate"}]}),
    "kept that is none": codes_of(kept={"value": 1}),
    "a dtype that is no float": codes_of(dtype={"dtype": "int8"}),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_hostile_descriptions(tmp_path, case):
    """Whoever writes a file can write its checksums too: what it describes is checked like any input."""
    arrays = {"codes": jnp.zeros((4, 2), jnp.int4), "scale": normal(1, 2), "three": normal(3, 2), "flat": normal(2)}
    path = tmp_path / "q.safetensors"
    jq.save(path, arrays)
    good = open_container(path)
    described = json.loads(good.metadata["jaxquant"].partition(" ")[2])

    def write(tree):
        text = json.dumps(described | {"tree": tree})
        write_container(path, {name: np.array(good.read(name)) for name in good.names}, {"jaxquant": seal(text)})

    stored = {name: np.array(good.read(name)) for name in good.names}
    for tree, raises in ((codes_of(), False), (DESCRIPTIONS[case], True)):
        text = json.dumps(described | {"tree": tree})
        write_container(path, stored, {"jaxquant": seal(text)})
        if raises:
            with pytest.raises(FileError, match=r"q\.safetensors"):
                jq.load(path)
        else:
            assert jq.load(path).shape == (4, 2)


def test_a_newer_version_says_so(tmp_path):
    path = tmp_path / "q.safetensors"
    write_container(path, {}, {"jaxquant": seal('{"version": 2, "anything": 1}')})
    with pytest.raises(FileError, match=r"version 2, and this jaxquant reads up to 1\. Install a newer"):
        jq.load(path)


def test_golden_file_of_version_1():
    """Written by the first jaxquant that could (tests/golden/make_checkpoint.py); it loads to these bytes for ever."""
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    from make_checkpoint import tree

    same(jq.load(ROOT / "tests" / "golden" / "checkpoint_v1.safetensors"), tree())


# What happens to a saver


SAVER = """
import os, sys
import jax.numpy as jnp, numpy as np
from jaxquant.files import save
# Forks savers that never start a backend of JAX: their arrays are numpy's.
trees = [{"w": np.full((64, 64), i, np.float32), "v": np.full(9000, i, np.int8)} for i in range(2)]
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        save(sys.argv[1], trees[1], shard_bytes=10_000)
        print(os.getpid(), flush=True)
        while True:
            for tree in trees:
                save(sys.argv[1], tree, shard_bytes=10_000)
    os.waitpid(child, 0)
"""


def test_a_saver_that_is_killed_leaves_a_checkpoint(tmp_path):
    path = tmp_path / "q.safetensors"
    trees = [{"w": np.full((64, 64), i, np.float32), "v": np.full(9000, i, np.int8)} for i in range(2)]
    jq.save(path, trees[0], shard_bytes=10_000)
    generator, seen = random.Random(0), set()
    with subprocess.Popen([sys.executable, "-c", SAVER, path], stdin=-1, stdout=-1, text=True) as saver:
        assert saver.stdout.readline() == "ready\n"
        for _ in range(100):
            print(file=saver.stdin, flush=True)
            child = int(saver.stdout.readline())
            time.sleep(generator.uniform(0.0, 0.02))
            os.kill(child, 9)
            back = jq.load(path)
            value = int(back["w"][0, 0])
            same(back, jax.tree.map(jnp.asarray, trees[value]))
            seen.add(value)
        saver.stdin.close()
    assert 1 in seen  # which each saver has written once before it is killed


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path, old = tmp_path / "q.safetensors", {"w": jnp.arange(64.0)}
    jq.save(path, old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {f"w{i}": np.full((64, 64), i, np.float32) for i in range(3)}
    for shard_bytes, limit in ((10**9, 30_000), (20_000, 17_000)):  # in the one file; in the entry after two shards
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match=r"q.*safetensors"):
                jq.save(path, large | {"z": np.zeros(3 * limit // 2, np.int8)}, shard_bytes=shard_bytes)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        same(jq.load(path), old)
        assert parts(tmp_path) == ["q.safetensors"]


CONCURRENT = """
import sys
import numpy as np
from jaxquant.files import save
number = int(sys.argv[2])
for turn in range(40):
    tree = {f"w{i}": np.full((32, 32), 100 * number + (turn + i) % 3, np.int32) for i in range(4)}
    save(sys.argv[1], tree, {"saver": number, "turn": turn}, shard_bytes=5000)
"""


def test_savers_and_a_reader_at_once(tmp_path):
    """Some shards of one tree are those of another: none is removed that is named."""
    path = tmp_path / "q.safetensors"
    jq.save(path, {})
    savers = [subprocess.Popen([sys.executable, "-c", CONCURRENT, path, str(number)]) for number in range(2)]
    while any(saver.poll() is None for saver in savers):
        values = {int(w[0, 0]) // 100 for w in jq.load(path).values()}
        assert len(values) <= 1
    assert [saver.returncode for saver in savers] == [0, 0]
    assert jq.load_metadata(path)["turn"] == 39 and len(jq.load(path)) == 4
    assert len(parts(tmp_path)) == 4


def test_a_rename_that_is_denied_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, old = tmp_path / "q.safetensors", {"w": jnp.arange(64.0)}
    jq.save(path, old)

    def denied(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", denied)
        with pytest.raises(PermissionError, match="Permission denied"):
            jq.save(path, {"w": jnp.zeros(64)})
    same(jq.load(path), old)
    assert parts(tmp_path) == ["q.safetensors"]
