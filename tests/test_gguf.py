"""GGUF: every ggml type against llama.cpp's own decoder, files written and read back, and files that are broken."""

import dataclasses
import itertools
import math
import struct
import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import llama_gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from llama import Llama, first_blocks
from mutations import mutations

import jaxquant as jq
from jaxquant.errors import FileError, FormatError, OptionError
from jaxquant.files.gguf.blocks import BLOCKS
from jaxquant.files.gguf.file import load_gguf, save_gguf
from jaxquant.inputs import Rescale
from jaxquant.quantizers.half_scales import half_scales
from jaxquant.stats import observe

TYPES = gguf.GGMLQuantizationType
AFFINE = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}
ARRAYS = ("float32", "float16", "bfloat16", "float64", "int8", "int16", "int32", "int64")


def decodable() -> list[str]:
    """The block types that the gguf package decodes."""
    found = []
    for kind, (block, width) in gguf.GGML_QUANT_SIZES.items():
        try:
            if block > 1:
                dequantize(np.zeros((1, width), np.uint8), kind)
                found.append(kind.name)
        except NotImplementedError:
            pass
    return found


def random_blocks(kind: str, count: int) -> np.ndarray:
    """Blocks of random bytes whose numbers are finite."""
    width = gguf.GGML_QUANT_SIZES[TYPES[kind]][1]
    blocks = np.random.default_rng(width).integers(0, 256, (2 * count, width), dtype=np.uint8)
    with np.errstate(all="ignore"):
        finite = np.isfinite(dequantize(blocks, TYPES[kind])).all(axis=1)
    return blocks[finite][:count]


def written(path, tensors=(), values=()):
    """A file by llama.cpp's own writer: of `(name, array, type or None)` and `(key, value, type)`."""
    writer = gguf.GGUFWriter(path, "test")
    for key, value, kind in values:
        writer.add_key_value(key, value, kind)
    writer.add_quantization_version(2)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_decodes_to(tensor, reference, kind):
    """Bit for bit; an affine one to the rounding of its float zero point, of `codes - zero`, and of the products.

    A number below the normal ones is 0 with its sign, which is what JAX makes of it on a CPU.
    """
    found = np.asarray(jq.dequantize(tensor))
    if kind not in AFFINE:
        reference = np.where(np.abs(reference) < np.finfo(np.float32).tiny, np.copysign(0, reference), reference)
        np.testing.assert_array_equal(found.view(np.int32), reference.view(np.int32))
        return
    offset = np.abs(np.asarray(tensor.zero, np.float64) * np.asarray(tensor.scale))
    offset = np.repeat(offset, reference.shape[-1] // offset.shape[-1], axis=-1)
    bound = 2.0**-24 * (offset + 3 * np.abs(reference)) * (1 + 2.0**-20)
    assert (np.abs(found.astype(np.float64) - reference) <= bound).all()


@pytest.mark.parametrize("kind", decodable())
def test_every_type_is_decoded_as_llama_cpp_does(tmp_path, kind):
    blocks = random_blocks(kind, 24).reshape(6, -1)
    path = written(tmp_path / "a.gguf", [("w", blocks, TYPES[kind])])
    file = load_gguf(path)
    tensor, reference = file.tensors["w"], dequantize(blocks, TYPES[kind])
    assert isinstance(tensor, jq.QTensor) == (kind in BLOCKS)
    assert tensor.shape == file.entries["w"].shape == reference.shape and file.entries["w"].kind == kind
    assert_decodes_to(tensor, reference, kind)


@pytest.mark.parametrize("kind", sorted(AFFINE))
def test_a_group_without_a_scale_is_its_offset(tmp_path, kind):
    blocks = np.repeat(random_blocks(kind, 1), 2, axis=0)
    start = 80 if kind == "Q2_K" else 0
    blocks[0, start : start + 2] = 0  # d of the first block
    file = load_gguf(written(tmp_path / "a.gguf", [("w", blocks, TYPES[kind])]))
    assert_decodes_to(file.tensors["w"], dequantize(blocks, TYPES[kind]), kind)


@pytest.mark.parametrize("kind", ("IQ4_NL", "MXFP4"))
def test_a_codebook_is_held_whole(tmp_path, kind):
    """Every number of a block under every scale that it can have, and each number is a code of its own."""
    block = np.arange(16, dtype=np.uint8) | np.arange(16, dtype=np.uint8)[::-1] << 4
    scales = np.float16(np.random.default_rng(0).standard_normal(250)) * np.float16(2.0) ** np.arange(-24, 1)[:, None]
    scales = np.concatenate([scales.reshape(-1).astype(np.float16), np.float16([0.0, -0.0, 65504, -65504])])
    scales = np.arange(252, dtype=np.uint8)[:, None] if kind == "MXFP4" else scales[:, None].view(np.uint8)
    blocks = np.concatenate([scales, np.repeat(block[None], len(scales), axis=0)], axis=1).reshape(len(scales) // 2, -1)
    tensor = load_gguf(written(tmp_path / "a.gguf", [("w", blocks, TYPES[kind])])).tensors["w"]
    assert tensor.description == "codebook4 g32" and tensor.codes.dtype == jnp.int4
    assert tensor.nbytes == len(scales) * (16 + 4) and tensor.levels == tuple(sorted(tensor.levels))
    assert set(np.asarray(tensor.codes[0], np.int8).tolist()) == set(range(-8, 8))
    assert_decodes_to(tensor, dequantize(blocks, TYPES[kind]), kind)
    jq.save(tmp_path / "a.safetensors", {"w": tensor})
    assert_decodes_to(jq.load(tmp_path / "a.safetensors")["w"], dequantize(blocks, TYPES[kind]), kind)


@pytest.mark.parametrize("kind", ("IQ4_NL", "MXFP4"))
def test_a_codebook_is_multiplied_as_it_decodes(tmp_path, kind):
    blocks = random_blocks(kind, 64)
    exponents = np.random.default_rng(1).integers(118, 128, len(blocks), dtype=np.uint8)
    scale = exponents[:, None] if kind == "MXFP4" else np.float16(0.01 * exponents - 1)[:, None].view(np.uint8)
    blocks[:, : scale.shape[1]] = scale
    path = written(tmp_path / "a.gguf", [("w", blocks.reshape(16, -1), TYPES[kind])])
    q, x = load_gguf(path).tensors["w"], jax.random.normal(jax.random.key(0), (3, 128))
    expected = x @ jq.dequantize(q).T
    np.testing.assert_allclose(
        jq.quantized(lambda w, x: x @ w.T, activations=None)(q, x), expected, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_as_they_are(tmp_path, name):
    array = (np.arange(24).reshape(2, 3, 4) - 7).astype(jnp.dtype(name))
    save_gguf(tmp_path / "a.gguf", {"w": array}, {"general.architecture": "test"})
    found = load_gguf(tmp_path / "a.gguf").tensors["w"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(np.asarray(found), array)
    (theirs,) = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    assert theirs.shape.tolist() == [4, 3, 2]
    assert theirs.data.tobytes() == array.tobytes()


VALUES = [
    ("text", "déjà vu", gguf.GGUFValueType.STRING),
    ("empty", "", gguf.GGUFValueType.STRING),
    ("uint8", np.uint8(200), gguf.GGUFValueType.UINT8),
    ("int8", np.int8(-3), gguf.GGUFValueType.INT8),
    ("uint16", np.uint16(60000), gguf.GGUFValueType.UINT16),
    ("int16", np.int16(-300), gguf.GGUFValueType.INT16),
    ("uint32", 4_000_000_000, gguf.GGUFValueType.UINT32),
    ("int32", -5, gguf.GGUFValueType.INT32),
    ("positive int32", np.int32(5), gguf.GGUFValueType.INT32),
    ("float32", 0.5, gguf.GGUFValueType.FLOAT32),
    ("true", True, gguf.GGUFValueType.BOOL),
    ("uint64", 2**63, gguf.GGUFValueType.UINT64),
    ("small uint64", np.uint64(7), gguf.GGUFValueType.UINT64),
    ("int64", -(2**40), gguf.GGUFValueType.INT64),
    ("float64", np.float64(0.1), gguf.GGUFValueType.FLOAT64),
]
LISTS = [
    ("texts", ["a", "", "ß"], None),
    ("ints", [1, -2, 3], np.int32),
    ("floats", [0.5, -1.5], np.float32),
    ("booleans", [True, False], np.bool_),
]


def test_values_have_their_types_and_are_written_as_they_were(tmp_path):
    lists = [(key, value, gguf.GGUFValueType.ARRAY) for key, value, _ in LISTS]
    path = written(tmp_path / "a.gguf", [("w", np.zeros(1, np.float32), None)], VALUES + lists)
    metadata = load_gguf(path).metadata
    for key, value, _ in VALUES:
        assert metadata[key] == value and type(metadata[key]) is type(value), key
    for key, value, dtype in LISTS:
        assert list(metadata[key]) == value and getattr(metadata[key], "dtype", None) == dtype, key
    save_gguf(tmp_path / "b.gguf", {"w": np.zeros(1, np.float32)}, metadata)
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()
    plain = metadata | {key: value for key, value, _ in LISTS}  # Python's own lists mean the same
    save_gguf(tmp_path / "b.gguf", {"w": np.zeros(1, np.float32)}, plain)
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("alignment", [8, 64])
def test_a_file_read_and_written_again_has_the_same_bytes(tmp_path, alignment):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "test")
    writer.add_custom_alignment(alignment)
    writer.add_quantization_version(2)
    for kind in ("Q8_0", "Q4_0", "Q4_1"):
        floats = rng.standard_normal((5, 96), np.float32)
        writer.add_tensor(kind, gguf.quants.quantize(floats, TYPES[kind]), raw_dtype=TYPES[kind])
    writer.add_tensor("norm", rng.standard_normal(7).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = load_gguf(tmp_path / "a.gguf")
    save_gguf(tmp_path / "b.gguf", file.tensors, file.metadata)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def weight(*shape: int) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(0), shape) + 0.003


def turn(q: jq.QTensor) -> jq.QTensor:
    return jax.tree.map(jnp.transpose, q)


int4 = jq.int4(group=32)
FORMATS = [
    (jq.int8(group=32), "Q8_0"),
    (jq.int8(group=64), "Q8_0"),
    (jq.int8, "Q8_0"),
    (jq.int4(group=32), "Q4_0"),
    (jq.int3(group=32), "Q4_0"),
    (jq.int2(group=32), "Q4_0"),
    (jq.int4(group=32, symmetric=False), "Q4_1"),
    (jq.int3(group=64, symmetric=False), "Q4_1"),
    (jq.int2(group=32, symmetric=False), "Q4_1"),
]


@pytest.mark.parametrize(("format", "kind"), FORMATS, ids=str)
def test_what_half_scales_writes_is_read_as_it_was(tmp_path, format, kind):
    """By us and by llama.cpp's own decoder, and it is what nearest rounding on scales in float16 gives."""
    w = weight(192, 24).at[:32, 0].set(0.0)
    q = jq.quantize_params({"kernel": w}, half_scales(format))["kernel"]
    save_gguf(tmp_path / "a.gguf", {"w": turn(q)}, {"general.architecture": "test"})
    file = load_gguf(tmp_path / "a.gguf")
    (theirs,) = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    assert theirs.tensor_type.name == file.entries["w"].kind == kind
    ours = np.asarray(jq.dequantize(turn(q)))
    tolerance = 0 if kind != "Q4_1" else 2.0**-22 * float(jnp.max((jnp.abs(q.zero) + 8) * q.scale))
    for read in (np.asarray(jq.dequantize(file.tensors["w"])), dequantize(theirs.data, theirs.tensor_type)):
        np.testing.assert_allclose(read, ours, rtol=0, atol=tolerance)
    if format.symmetric:  # else float16 moves the offset, and the ends of a range with it
        half_step = np.repeat(np.asarray(q.scale) / 2, len(w) // len(q.scale), axis=0)
        assert (np.abs(ours.T - w) <= half_step * (1 + 1e-6)).all()
    error, plain = (float(jnp.linalg.norm(jq.dequantize(one) - w)) for one in (q, jq.quantize(w, format, axis=0)))
    assert error <= 1.01 * plain


@dataclasses.dataclass(frozen=True)
class InPairs:
    """Where inputs come in equal pairs, the second of a pair makes up for the rounding of the first."""

    format: jq.Format

    def __call__(self, w, stats):
        q = jq.quantize(w, self.format)
        steps = w / jnp.repeat(q.scale, 32, axis=0)
        first = jnp.round(steps[0::2])
        second = jnp.clip(jnp.round(steps[1::2] + steps[0::2] - first), -7, 7)
        return dataclasses.replace(q, codes=jnp.stack([first, second], 1).reshape(w.shape).astype(jnp.int4))


@dataclasses.dataclass(frozen=True)
class Rescaled:
    """What no block has a place for: something is done to the input first."""

    format: jq.Format

    def __call__(self, w, stats):
        return dataclasses.replace(jq.quantize(w, self.format), transform=(Rescale(jnp.ones((len(w), 1))),))


def test_half_scales_keeps_the_codes_of_a_better_quantizer():
    x = jnp.repeat(jax.random.normal(jax.random.key(1), (256, 32)), 2, axis=1)
    stats, w = observe(x, gram=True), weight(64, 32)
    kept, nearest = (half_scales(inner)(w, stats) for inner in (InPairs(int4), int4))
    error = lambda q: float(jnp.linalg.norm(x @ (jq.dequantize(q) - w)))  # noqa: E731
    assert error(kept) < 0.8 * error(nearest)
    np.testing.assert_array_equal(kept.codes, InPairs(int4)(w, stats).codes)
    np.testing.assert_array_equal(kept.scale, np.float32(np.float16(kept.scale)))
    with pytest.raises(OptionError, match="int8 g32 rescaled"):
        half_scales(Rescaled(jq.int8(group=32)))(w, stats)


@pytest.mark.parametrize("rows", [1, 16])
def test_a_float_zero_point_is_multiplied_in_integers_too(rows):
    """With power-of-two scales, codes that say the activations exactly, and zero points in quarters: equal."""
    q = jq.quantize(weight(128, 16), jq.int4(group=32, symmetric=False), axis=0)
    scale = jnp.exp2(jnp.round(jnp.log2(q.scale)))
    q = dataclasses.replace(q, scale=scale, zero=q.zero.astype(jnp.float32) + 0.25)
    x = jax.random.randint(jax.random.key(3), (rows, 128), -127, 128).at[:, 0].set(127).astype(jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(jq.dequantize(q), np.float64)
    for activations in (None, jq.int8):
        found = jq.quantized(lambda w, x: x @ w, activations=activations)(q, x)
        np.testing.assert_array_equal(np.asarray(found, np.float64), expected)
        # At the default precision a row of floats keeps 25 bits against codes of 4.
        exactly = jq.quantized(lambda w, x: jnp.dot(x, w.T, precision="highest"), activations=activations)
        np.testing.assert_array_equal(np.asarray(exactly(turn(q), x), np.float64), expected)


UNWRITABLE = [
    (lambda: jq.quantize(weight(4, 64), int4, axis=1), "the scale of block 0 is .* no float16"),
    (lambda: jq.quantize(weight(4, 64), jq.int4(group=16), axis=1), "a scale serves 32 inputs"),
    (lambda: jq.quantize(weight(64, 4), int4, axis=0), "which here is 4 long"),
    (lambda: jq.quantize(weight(4, 64), jq.int8(symmetric=False), axis=1), "no zero point"),
    (lambda: jq.quantize(weight(4, 64), jq.nf4, axis=1), "integer codes"),
    (lambda: jq.quantize(weight(4, 64), jq.fp8, axis=1), "integer codes"),
    (lambda: turn(Rescaled(int4)(weight(64, 4), None)), "done to the input"),
    (lambda: jnp.zeros((2, 2), jnp.complex64), "complex64"),
    (lambda: [1.0], "is list"),
]


@pytest.mark.parametrize(("make", "message"), UNWRITABLE)
def test_what_no_block_holds_is_an_error_and_leaves_the_old_file(tmp_path, make, message):
    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(FormatError, match=f"tensor 'w'.*{message}"):
        save_gguf(tmp_path / "a.gguf", {"first": np.zeros(3, np.float32), "w": make()}, {})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.gguf", b"old")]


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"w": np.zeros(())}, {}, r"the shape \(\)"),
        ({"w": np.zeros((2, 0))}, {}, r"the shape \(2, 0\)"),
        ({"w": np.zeros((1, 1, 1, 1, 2))}, {}, "1 to 4 axes"),
        ({"w" * 64: np.zeros(2)}, {}, "longer than the 63 bytes"),
        ({}, {"a": None}, r"metadata\['a'\] is None"),
        ({}, {"a": {"b": 1}}, "metadata"),
        ({}, {"a": 2**64}, "metadata"),
        ({}, {"a": ["b", 1]}, "metadata"),
        ({}, {"a": np.zeros((2, 2))}, "metadata"),
        ({}, {"general.alignment": 24}, "'general.alignment' is 24"),
    ],
)
def test_what_has_no_place_in_a_file(tmp_path, tensors, metadata, message):
    with pytest.raises(FileError, match=message):
        save_gguf(tmp_path / "a.gguf", tensors, metadata)
    assert not list(tmp_path.iterdir())


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def entry(name="w", dims=(32,), kind=0, offset=0, axes=None) -> bytes:
    return text(name) + u32(len(dims) if axes is None else axes) + u64(*dims) + u32(kind) + u64(offset)


START, ENTRY = b"GGUF" + u32(3), entry()


def raw(*values: bytes, entries=(ENTRY,), counts=None, start=START, data=bytes(128)) -> bytes:
    """A file of any bytes: 32 float32 zeros, unless something else is said."""
    tensors, keys = counts or (len(entries), len(values))
    header = start + u64(tensors, keys) + b"".join(values) + b"".join(entries)
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + data


VALUE = text("key")
ALIGNED = text("general.alignment") + u32(4)
BROKEN = {
    "nothing": (b"", "'GGUF' at byte 0 would take 4 bytes"),
    "magic": (raw(start=b"GGML" + u32(3)), "begins with b'GGML'"),
    "version 0": (raw(start=b"GGUF" + u32(0)), "version 0"),
    "version 1": (raw(start=b"GGUF" + u32(1)), "version 1"),
    "a future version": (raw(start=b"GGUF" + u32(4)), "version 4.*newer jaxquant"),
    "big-endian": (raw(start=b"GGUF" + struct.pack(">I", 3)), "big-endian"),
    "too many tensors": (raw(counts=(2**63, 0)), "the list of tensors, 9223372036854775808"),
    "too many values": (raw(counts=(0, 2**64 - 1)), "the values, 18446744073709551615"),
    "a long key": (raw(u64(2**63) + b"key" + bytes(20)), "the key of value 0"),
    "a long text": (raw(VALUE + u32(8) + u64(2**40)), "the value of 'key'"),
    "a long array": (raw(VALUE + u32(9, 6) + u64(2**62)), "the value of 'key'"),
    "a long array of texts": (raw(VALUE + u32(9, 8) + u64(2**61)), "the value of 'key'"),
    "an unknown value": (raw(VALUE + u32(13) + bytes(8)), "type 13, which is not known"),
    "an unknown array": (raw(VALUE + u32(9, 99) + u64(1)), "an array of type 99"),
    "arrays in arrays": (raw(VALUE + u32(9) + (u32(9) + u64(1)) * 1000), "an array of type 9"),
    "a boolean of 2": (raw(VALUE + u32(7) + b"\2" + bytes(8)), "neither 0 nor 1"),
    "a key that is no text": (raw(text(b"\xff\xfe") + u32(4, 1)), "value 0, before byte .* UTF-8"),
    "a text that is none": (raw(VALUE + u32(8) + text(b"a\xff")), "value of 'key', before byte .* UTF-8"),
    "a key twice": (raw(*[VALUE + u32(4, 1)] * 2), "'key' more than once"),
    "alignment 0": (raw(ALIGNED + u32(0)), "'general.alignment' is 0"),
    "alignment 24": (raw(ALIGNED + u32(24)), "'general.alignment' is 24"),
    "alignment as text": (raw(text("general.alignment") + u32(8) + text("x")), "'general.alignment' is 'x'"),
    "a name that is no text": (raw(entries=[entry(b"\xff")]), "tensor 0, before byte .* UTF-8"),
    "a name twice": (raw(entries=[entry()] * 2), "tensor 'w' more than once"),
    "no axes": (raw(entries=[entry(dims=())], data=bytes(200)), "'w' has 0 axes"),
    "five axes": (raw(entries=[entry(dims=(1,) * 5)]), "'w' has 5 axes"),
    "very many axes": (raw(entries=[entry(axes=2**32 - 1)]), "'w' has 4294967295 axes"),
    "an axis of 0": (raw(entries=[entry(dims=(4, 0))]), r"shape \(0, 4\), which holds nothing"),
    "a product beyond 64 bits": (raw(entries=[entry(dims=(4194305, 4194305, 2**47))]), "lies in bytes"),
    "beyond the file": (raw(entries=[entry(dims=(33,))]), "'w', F32 of shape .*lies in bytes 64 to 196"),
    "an offset beyond": (raw(entries=[entry(offset=2**63)]), "lies in bytes"),
    "an unknown type beyond": (raw(entries=[entry(kind=99, offset=1 << 20)]), "'w', type 99 of shape"),
    "an odd offset": (raw(entries=[entry(dims=(8,), offset=16)]), "offset 16, which is no multiple of 32"),
    "blocks that do not fit": (raw(entries=[entry(dims=(48,), kind=8)]), r"Q8_0, in blocks of 32, .* \(48,\)"),
    "overlapping": (raw(entries=[entry(), entry("v", (8,), offset=32)]), "'w' and 'v' overlap, at byte"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_an_error_that_says_where(tmp_path, case):
    data, message = BROKEN[case]
    (tmp_path / "a.gguf").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(FileError, match=rf"a\.gguf: .*{message}"):
        load_gguf(tmp_path / "a.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_the_file_these_are_broken_from_is_whole(tmp_path):
    (tmp_path / "a.gguf").write_bytes(raw(VALUE + u32(4, 7), ALIGNED + u32(32)))
    file = load_gguf(tmp_path / "a.gguf")
    assert file.metadata == {"key": 7, "general.alignment": 32}
    assert not np.any(file.tensors["w"]) and file.tensors["w"].shape == (32,)


def small(path):
    blocks = [(kind, random_blocks(kind, 1), TYPES[kind]) for kind in ("Q4_1", "Q6_K", "IQ4_NL", "IQ4_XS")]
    return written(path, [*blocks, ("norm", np.arange(8, dtype=np.float32), None)], VALUES[:6]).read_bytes()


@pytest.mark.parametrize("sixteenth", range(16))
def test_a_file_that_is_cut_short_is_an_error(tmp_path, sixteenth):
    data = small(tmp_path / "whole.gguf")
    (tmp_path / "a.gguf").write_bytes(data[: len(data) * sixteenth // 16])
    with pytest.raises(FileError, match=r"a\.gguf"):
        load_gguf(tmp_path / "a.gguf")


def test_a_tensor_of_an_unknown_type_is_listed_and_the_others_are_read(tmp_path):
    entries = [entry("new", (5, 7), kind=99), entry("old", (8,), kind=15, offset=64), entry("w", (8,), offset=96)]
    entries[1] = entry("old", (256,), kind=15, offset=32)  # Q8_K, which the package knows and does not decode
    entries[2] = entry("w", (8,), offset=352)
    (tmp_path / "a.gguf").write_bytes(raw(entries=entries, data=bytes(384)))
    file = load_gguf(tmp_path / "a.gguf")
    assert [(name, e.kind, e.shape) for name, e in file.entries.items()] == [
        ("new", "type 99", (7, 5)),
        ("old", "Q8_K", (256,)),
        ("w", "F32", (8,)),
    ]
    assert not np.any(file.tensors["w"]) and "new" in file.tensors and len(file.tensors) == 3
    with pytest.raises(FileError, match=r"a\.gguf: tensor 'new' is of ggml type 99"):
        file.tensors["new"]
    with pytest.raises(FileError, match=r"a\.gguf: tensor 'old' is Q8_K, which the gguf package cannot decode"):
        file.tensors["old"]


@pytest.mark.parametrize("bits", [0x7C00, 0x7E00], ids=["inf", "nan"])
@pytest.mark.parametrize("kind", [*sorted(set(BLOCKS) - {"MXFP4"}), "IQ4_XS"])
def test_a_scale_that_is_no_number_names_the_tensor_and_the_block(tmp_path, kind, bits):
    blocks = random_blocks(kind, 4)
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(kind, 0)
    blocks[2, at : at + 2] = np.frombuffer(struct.pack("<H", bits), np.uint8)
    path = written(tmp_path / "a.gguf", [("w", blocks, TYPES[kind])])
    with pytest.raises(FileError, match=rf"a\.gguf: tensor 'w', {kind}: block 2 has -?(inf|nan)"):
        load_gguf(path).tensors["w"]


@pytest.mark.parametrize(("exponent", "number"), [(255, 0), (254, 1), (253, 6)])
def test_a_number_beyond_float32_names_the_tensor_and_the_block(tmp_path, exponent, number):
    """An e8m0 of 255 is NaN, one of 254 would leave no room in the scale, and 4 * 2^126 is beyond float32."""
    blocks = np.full((4, 17), 120, np.uint8)
    blocks[2] = [exponent, *[number] * 16]
    path = written(tmp_path / "a.gguf", [("w", blocks, TYPES.MXFP4)])
    with pytest.raises(FileError, match=r"a\.gguf: tensor 'w', MXFP4: block 2 has inf"):
        load_gguf(path).tensors["w"]


def test_a_damaged_file_is_an_error_or_is_read(tmp_path):
    """Whatever is damaged, a tensor has the shape that is announced, or the error is ours."""
    data, path = small(tmp_path / "whole.gguf"), tmp_path / "a.gguf"
    header, tensors = data[:-560], data[-560:]
    near = itertools.chain((m + tensors for m in mutations(0, header, 5500)), mutations(1, data, 500))
    refused, read = 0, 0
    with path.open("wb", buffering=0) as file:
        for index, mutant in enumerate(near):
            file.seek(0)
            file.write(mutant)
            file.truncate()
            try:
                found = load_gguf(path)
                for name in found.entries if index % 25 == 0 else ():
                    assert found.tensors[name].shape == found.entries[name].shape
                read += 1
            except FileError as error:
                assert "a.gguf: " in str(error)
                refused += 1
    assert min(refused, read) > 500


def test_a_name_that_is_not_there_is_a_key_error(tmp_path):
    (tmp_path / "a.gguf").write_bytes(raw())
    with pytest.raises(KeyError, match="v"):
        load_gguf(tmp_path / "a.gguf").tensors["v"]
    with pytest.raises(OSError):
        load_gguf(tmp_path / "none.gguf")


@pytest.mark.model
def test_smollm2_is_read_as_llama_cpp_does_and_written_again_as_it_was(tmp_path):
    path = llama_gguf.fetch_smollm2()
    file = load_gguf(path)
    tensors, theirs = dict(file.tensors), {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors.keys() == theirs.keys()
    for name, tensor in itertools.islice(theirs.items(), 0, None, 9):
        reference = dequantize(tensor.data, tensor.tensor_type).reshape(tensors[name].shape)
        assert_decodes_to(tensors[name], reference, tensor.tensor_type.name)
    save_gguf(tmp_path / "copy.gguf", tensors, file.metadata)
    assert path.read_bytes() == (tmp_path / "copy.gguf").read_bytes()


@pytest.mark.model
@pytest.mark.example
def test_smollm2_in_its_codes_means_the_decoded_model():
    """Law 1: no weight was decoded on the way in, and in float arithmetic the logits are those of the floats."""
    config, params = llama_gguf.load_codes(llama_gguf.fetch_smollm2())
    weights = [leaf for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, jq.QTensor)) if leaf.ndim > 1]
    assert all(isinstance(leaf, jq.QTensor) for leaf in weights) and len(weights) == 211
    assert sum(leaf.nbytes for leaf in weights) < 6.9 / 8 * sum(math.prod(leaf.shape) for leaf in weights)
    config, params = first_blocks(config, params, 4)
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, config.vocab)
    forward = Llama(config).apply
    expected, _ = jax.jit(forward)(jq.dequantize(params), tokens)
    found, _ = jax.jit(jq.quantized(forward, activations=None))(params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * float(jnp.max(jnp.abs(expected))))
