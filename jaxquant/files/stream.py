"""`quantize_checkpoint`: a checkpoint that is larger than memory, one part after the other.

    source --read a part--> floats --quantizer--> codes --write a shard-->  ...  --write the entry--> a checkpoint

A shard says of itself what is in it, under a name that follows from the source and the quantizer. What an earlier run
that was stopped has written is found again.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxquant.errors import FileError, NoMatchError, NonFiniteError, ShapeError
from jaxquant.files.arrays import entry_of, in_parts, on_disk
from jaxquant.files.checkpoint import Checkpoint, nested, open_checkpoint
from jaxquant.files.container import open_container, write_container
from jaxquant.files.description import Node, describe
from jaxquant.files.load import seal, shard_name, shards, unsealed
from jaxquant.files.save import locked, remove, write_entry
from jaxquant.files.slabs import free_axis, in_slabs
from jaxquant.format import Format, int8
from jaxquant.params import is_matrix, quantize_params
from jaxquant.qtensor import QTensor
from jaxquant.quantizers import Quantizer
from jaxquant.stats import Stats

_PART_NAME = "jaxquant part"  # of its own description, among the texts of a shard
_PART = 2**28  # bytes of the source that are read for one shard, or one tensor where that is more


def quantize_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    quantizer: Format | Quantizer = int8,
    *,
    stats: Mapping[str, Stats] | None = None,
    where: Callable[[str, Array], bool] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Quantizes a checkpoint of safetensors files into one of `save`'s, in the memory of its largest tensor.

    Where scales belong to channels or groups and weights are rounded to nearest, tensors are not held in float: they
    are read and written in codes slab by slab. Other quantizers, statistics and a scale per tensor need one whole.

    What is quantized, and how, is as `quantize_params` has it: a tensor `a.b.weight` is the leaf `a/b/weight`. A run
    that was stopped goes on where it was when it is started again.

    Args:
      src: a safetensors file, the index of several, or the folder of either.
      dst: of the file that `load` takes; its shards lie beside it.
      quantizer: a format or a quantizer.
      stats: of the tensors, by path, for quantizers that need them.
      where: `(path, array) -> bool` in the place of the default rule.
      progress: told how many bytes of the source are done, and of how many.

    Raises:
      FileError: a file of the source is broken.
      NoMatchError: no tensor was chosen.
      NonFiniteError, ShapeError, StatsError: as `quantize_params`, naming the tensor's path.
      OSError: a disk is full, or a file cannot be read or written.
    """
    source, dst = open_checkpoint(src), Path(dst)
    plan = _plan(source, quantizer, where or is_matrix, stats)
    total = sum(plan.sizes.values())
    nodes, tensors, done = {}, {}, 0
    with locked(dst.parent):
        for place, names in enumerate(in_parts(plan.sizes, _PART)):
            file = shard_name(dst, f"{plan.name} {place}")
            part = _found(dst.parent / file) or _written(dst.parent / file, names, plan)
            nodes |= part["nodes"]
            tensors |= {name: {**entry, "file": file} for name, entry in part["tensors"].items()}
            done += sum(plan.sizes[name] for name in names)
            progress(done, total)
        old = shards(dst)
        tree = _tree({tuple(name.split(".")): node for name, node in nodes.items()})
        write_entry(dst, {}, {"tree": tree, "tensors": tensors, "metadata": {"quantizer": plan.quantizer_name}})
        remove(dst.parent, old - {entry["file"] for entry in tensors.values()})


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done with every tensor of a source.

    Args:
      source: the checkpoint.
      sizes: the bytes of each tensor.
      chosen: the tensors that are quantized.
      quantizer: how.
      stats: of their inputs.
    """

    source: Checkpoint
    sizes: Mapping[str, int]
    chosen: frozenset[str]
    quantizer: Format | Quantizer
    stats: Mapping[str, Stats]

    @property
    def quantizer_name(self) -> str:
        """The quantizer in words, without the addresses that Python puts into them."""
        return re.sub(r" at 0x[0-9a-f]+", "", repr(self.quantizer))

    @property
    def name(self) -> str:
        """What tells a plan from another: the files of the source as they are now, and what is done with them."""
        files = sorted({container.path for container in self.source.places.values()})
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return repr((states, sorted(self.chosen), self.quantizer_name, sorted(self.stats)))


def _plan(
    source: Checkpoint, quantizer: Format | Quantizer, where: Callable, stats: Mapping[str, Stats] | None
) -> Plan:
    arrays = {name: source.read(name) for name in source.names}  # mapped, not read
    nested(arrays, source.path)  # an error of names comes before any work
    floats = {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    chosen = frozenset(name for name, array in floats.items() if where(_path(name), array))
    if not chosen:
        names = ", ".join(list(floats)[:40])
        raise NoMatchError(f"{source.path}: none of its floating tensors was chosen: {names or 'it has none'}.")
    return Plan(source, {name: array.nbytes for name, array in arrays.items()}, chosen, quantizer, stats or {})


def _path(name: str) -> str:
    return name.replace(".", "/")


def _found(path: Path) -> dict[str, Any] | None:
    """What an earlier run has written under this name, which stands for its content."""
    if not path.exists():
        return None
    try:
        return json.loads(unsealed(open_container(path), _PART_NAME))
    except FileError:  # not of an earlier run: it is written anew
        return None


def _written(path: Path, names: list[str], plan: Plan) -> dict[str, Any]:
    """Quantizes a part and writes it, with what is in it."""
    arrays: dict[str, np.ndarray] = {}
    nodes: dict[str, Node] = {}
    tensors: dict[str, Any] = {}
    for name in names:
        nodes[name], written, entries = _described(name, plan)
        arrays |= written
        tensors |= entries
    part = {"nodes": nodes, "tensors": tensors}
    write_container(path, arrays, {_PART_NAME: seal(json.dumps(part))})
    return part


def _described(name: str, plan: Plan) -> tuple[Node, dict[str, np.ndarray], dict[str, Any]]:
    """A leaf as it is written: its description, its arrays, and the entry of each."""
    node, stored = describe(_leaf(name, plan), tuple(name.split(".")))
    written, entries = {}, {}
    for key in list(stored):
        # Taken out, because the functions inside `describe` hold each other, and this dict, until they are collected.
        part = stored.pop(key)
        written[key] = on_disk(part)
        entries[key] = entry_of(part, written[key])
    return node, written, entries


def _tree(nodes: Mapping[tuple[str, ...], Node]) -> Node:
    """The description of dicts in dicts, from those of their leaves."""
    children: dict[str, dict[tuple[str, ...], Node]] = {}
    for (first, *rest), node in nodes.items():
        children.setdefault(first, {})[tuple(rest)] = node
    return {"dict": [[key, inner[()] if () in inner else _tree(inner)] for key, inner in children.items()]}


def _leaf(name: str, plan: Plan) -> Any:
    # In a map of its own: the pages that were read leave memory with it, or before each slab.
    source = open_container(plan.source.places[name].path)

    def read() -> np.ndarray:
        source.release()
        return source.read(name)

    def encode(array: Array) -> QTensor:
        return quantize_params({path: array}, plan.quantizer, stats=plan.stats, where=lambda *_: True)[path]

    array, path = read(), _path(name)
    if name not in plan.chosen:
        return array
    axis = None if path in plan.stats else free_axis(path, array.shape, plan.quantizer)
    if axis is not None:
        with contextlib.suppress(NonFiniteError, ShapeError):  # the same of the whole says where in it
            return in_slabs(read, axis, encode)
    return encode(jnp.asarray(array))
