"""Files near valid ones, many of them: each is read, or refused by an error of ours; nothing grows beyond the file.

`python tests/test_fuzz.py 1000000` goes on for longer, from another seed.
"""

import itertools
import json
import math
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutations import edits, mutations

import jaxquant as jq
from jaxquant.errors import FileError
from jaxquant.files.container import open_container, write_container
from jaxquant.files.load import seal, unsealed

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = ("gptq_v1_affine_act_order", "awq", "bnb_nf4_double", "ct_w4a16_affine", "ct_w8a8")


def container(texts: dict[str, str], tensors: dict[str, np.ndarray]) -> bytes:
    """A valid safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        write_container(Path(folder) / "a", tensors, texts)
        return (Path(folder) / "a").read_bytes()


def ours() -> bytes:
    """A checkpoint of `save`'s."""
    tree = {"w": jq.quantize(jnp.ones((8, 4)), jq.int3(group=4, symmetric=False)), "b": [jnp.ones(3), None, 1.5]}
    with tempfile.TemporaryDirectory() as folder:
        jq.save(Path(folder) / "a", tree)
        return (Path(folder) / "a").read_bytes()


def opened(data: bytes) -> tuple[str, bytes]:
    """The header of a safetensors file, and what follows it."""
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length].decode(), data[8 + length :]


def headed(header: str, rest: bytes) -> bytes:
    """A safetensors file of a header and what follows it."""
    return struct.pack("<Q", len(header.encode())) + header.encode() + rest


def resealed(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Checkpoints whose description is damaged, in its bytes or in its parts, and its checksum made to fit."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").write_bytes(data)
        text = unsealed(open_container(Path(folder) / "a"), "jaxquant")
    header, rest = opened(data)
    texts = (mutant.decode("latin-1") for mutant in mutations(seed, text.encode(), count // 2))
    for mutant in itertools.chain(texts, edits(seed, text, count - count // 2)):
        changed = json.loads(header)
        changed["__metadata__"]["jaxquant"] = seal(mutant)
        yield headed(json.dumps(changed), rest)


def reheaded(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Safetensors files whose header has other parts."""
    header, rest = opened(data)
    return (headed(mutant, rest) for mutant in edits(seed, header, count))


def arrays(tree) -> int:
    """The bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


def refused(path: Path, mutants: Iterator[bytes], read: Callable[[], object]) -> tuple[int, int]:
    """How many of the mutants were refused, and how many read."""
    counts = [0, 0]
    others = sum(file.stat().st_size for file in path.parent.iterdir() if file != path)
    with path.open("wb", buffering=0) as file:
        for mutant in mutants:
            file.seek(0)
            file.write(mutant)
            file.truncate()
            try:
                tree = read()
            except FileError:
                counts[0] += 1
            else:
                counts[1] += 1
                assert arrays(tree) <= 8 * (others + len(mutant))  # a byte holds eight codes of one bit
    return counts[0], counts[1]


def fuzz_containers(folder: Path, seed: int, count: int) -> tuple[int, int]:
    """Safetensors files of any kind."""
    path = folder / "a.safetensors"
    data = container({"format": "pt"}, {"a": np.ones((2, 3), np.float32), "b": np.arange(4).astype(jnp.bfloat16)})

    def read():
        found = open_container(path)
        return [np.array(found.read(name)) for name in found.names]

    return refused(path, mutations(seed, data, count), read)


def fuzz_checkpoints(folder: Path, seed: int, count: int) -> tuple[int, int]:
    """Files of `save`'s, their descriptions with and without a checksum that fits."""
    path, data = folder / "q.safetensors", ours()
    first = refused(path, mutations(seed, data, count // 3), lambda: jq.load(path))
    second = refused(path, resealed(data, seed, count - count // 3), lambda: jq.load(path))
    return first[0] + second[0], first[1] + second[1]


def fuzz_layout(layout: str, folder: Path, seed: int, count: int) -> tuple[int, int]:
    """Checkpoints of others: the tensors, and the config beside them."""
    whole = open_container(GOLDEN / f"{layout}.safetensors")
    config = whole.metadata["config"].encode()
    data = container({}, {name: np.array(whole.read(name)) for name in whole.names if name != "expected"})
    path, beside = folder / "model.safetensors", folder / "config.json"

    def read():
        return jq.load_safetensors(folder)

    beside.write_bytes(config)
    quarter = count // 4
    files = itertools.chain(mutations(seed, data, quarter), reheaded(data, seed, quarter))
    first = refused(path, files, read)
    path.write_bytes(data)
    texts = (text.encode() for text in edits(seed, config.decode(), count - 3 * quarter))
    second = refused(beside, itertools.chain(mutations(seed, config, quarter), texts), read)
    return first[0] + second[0], first[1] + second[1]


@pytest.mark.parametrize(("fuzz", "count"), ((fuzz_containers, 7000), (fuzz_checkpoints, 4000)))
def test_files_of_ours(tmp_path, fuzz, count):
    found = fuzz(tmp_path, 0, count)
    assert sum(found) == count and min(found) > 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_others(tmp_path, layout):
    found = fuzz_layout(layout, tmp_path, 0, 600)
    assert sum(found) == 600 and min(found) > 10


if __name__ == "__main__":
    seed, count = random.SystemRandom().getrandbits(32), math.ceil(int(sys.argv[1]) / 3)
    with tempfile.TemporaryDirectory() as name:
        for fuzz in (fuzz_containers, fuzz_checkpoints):
            print(seed, fuzz.__name__, *fuzz(Path(name), seed, count))
        for layout in LAYOUTS:
            print(seed, layout, *fuzz_layout(layout, Path(name), seed, math.ceil(count / len(LAYOUTS))))
