"""`lower_for`: compiles a function for a GPU in a process of its own, on a machine without one.

Nothing runs on a GPU: kernels and memory are facts, speed is not. Some bad programs abort the compiler, which is why it
has a process of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxquant.errors import CompileError, MissingPackageError, OptionError
from jaxquant.lowering.program import Program
from jaxquant.lowering.targets import TARGETS
from jaxquant.optional import optional

_PLUGIN = "jax_plugins.xla_cuda12"


def lower_for(
    target: str,
    fn: Callable,
    *args: Any,
    devices: int = 1,
    specs: Any = None,
    donate: Sequence[int] = (),
) -> Program:
    """Compiles `jax.jit(fn)` for a GPU that need not be there, and tells what became of it.

    Args:
      target: `"h100"`, `"a100"` or `"rtx4090"`.
      fn: the function; what it holds has to be picklable.
      *args: its arguments: arrays, `QTensor`s, `jax.ShapeDtypeStruct`s.
      devices: how many of the GPUs, in a mesh of one axis that is called `"model"`.
      specs: a tree of `PartitionSpec`s, or a prefix of one, of the tuple of arguments; an axis that cannot be divided,
        such as that of a scale per tensor, stays whole. None: everything is on every device.
      donate: the arguments whose memory the outputs may take.

    Returns:
      A `Program`: bytes, matmuls and how each was lowered, tensor-core instructions, the largest results, collectives.

    Raises:
      OptionError: there is no such target.
      MissingPackageError: the packages it needs are not installed.
      CompileError: the compiler refused the program, or broke on it.
    """
    if target not in TARGETS:
        raise OptionError(f"target={target!r}: it is one of {', '.join(TARGETS)}.")
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec(_PLUGIN) is None:
        version = f"=={jax.__version__}"
        raise MissingPackageError(
            "compiling for a GPU without one needs XLA for CUDA: pip install --no-deps "
            f"jax-cuda12-pjrt{version} nvidia-cuda-nvcc-cu12 (without their dependencies: nothing runs on a GPU)."
        )
    pickle = optional("cloudpickle", "pip install 'jaxquant[gpu]'")
    shapes = jax.tree.map(_shape_of, args)
    spread = jax.tree.broadcast(PartitionSpec() if specs is None else specs, shapes, is_leaf=_is_spec)
    spread = jax.tree.leaves(spread, is_leaf=_is_spec)
    task = (TARGETS[target].text, fn, shapes, spread, devices, tuple(donate))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "task").write_bytes(pickle.dumps(task))
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        command = [sys.executable, "-m", "jaxquant.lowering.child", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(f"compiling for {target} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        record = json.loads(Path(folder, "record").read_text())
    return Program.of_record({"target": target, "devices": devices, "memory_bytes": TARGETS[target].memory, **record})


def _shape_of(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else leaf


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
