"""The process that compiles: `python -m jaxquant.lowering.child FOLDER`, with a task in it, where the record goes."""

import json
import pickle
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant.lowering import reading


def main(folder: Path) -> None:
    """Compiles the task of a folder and writes down what came out."""
    target, fn, shapes, specs, devices, donate = pickle.loads((folder / "task").read_bytes())
    topology = topologies.get_topology_desc("gpu", "cuda", target_config=target, topology=f"1x1x{devices}")
    mesh = Mesh(np.array(topology.devices), ("model",))
    leaves, treedef = jax.tree.flatten(shapes)
    arrays = [place for place, leaf in enumerate(leaves) if hasattr(leaf, "shape")]  # what is no array is static
    owners = [owner for owner, arg in enumerate(shapes) for _ in jax.tree.leaves(arg)]

    def run(*values):
        filled = dict(enumerate(leaves)) | dict(zip(arrays, values, strict=True))
        return fn(*treedef.unflatten(filled.values()))

    placed = [_placed(leaves[place], specs[place], mesh) for place in arrays]
    donated = [index for index, place in enumerate(arrays) if owners[place] in donate]
    lowered = jax.jit(run, donate_argnums=donated).lower(*placed)
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(folder / "dump")})
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    found = reading.computations(text)
    kernels = reading.tensor_cores(path.read_text() for path in sorted((folder / "dump").glob("*.ptx")))
    record = {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "tensor_cores": sum(kernels.values(), Counter()),
        "multiplications": [vars(one) for one in reading.multiplications(found, kernels)],
        "buffers": reading.buffers(found),
        "collectives": [vars(one) for one in reading.collectives(found)],
    }
    (folder / "record").write_text(json.dumps(record))


def _placed(leaf: Any, spec: PartitionSpec, mesh: Mesh) -> jax.ShapeDtypeStruct:
    axes = tuple(spec)[: len(leaf.shape)]
    kept = [axis if axis is None or n % mesh.size == 0 else None for axis, n in zip(axes, leaf.shape, strict=False)]
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*kept)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
