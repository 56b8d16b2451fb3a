"""`load_safetensors`: a Hugging Face checkpoint as a tree of parameters, its quantized weights as `QTensor`s.

`READERS` says who reads what: a key is the `quant_method` of the checkpoint's config, and a value makes the `Layout` of
its settings. No reader decodes: codes stay codes, scales become float32, which holds them exactly.
"""

import os
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxquant.errors import FileError
from jaxquant.files.checkpoint import Checkpoint, nested, open_checkpoint, read_object
from jaxquant.files.huggingface import awq, bitsandbytes, compressed_tensors, gptq
from jaxquant.files.huggingface.parts import Layout, Parts, Settings, float_dtype
from jaxquant.qtensor import QTensor

READERS = {
    "gptq": gptq.layout,
    "awq": awq.layout,
    "bitsandbytes": bitsandbytes.layout,
    "compressed-tensors": compressed_tensors.layout,
}
# Tensors that only make sense beside a config that says how to read them.
_CODES = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "weight.absmax", "SCB")


def load_safetensors(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a checkpoint of Hugging Face into nested dicts, splitting the names of its tensors at their dots.

    Arrays keep torch's layout, so a linear layer's `weight` is `[outputs, inputs]`; those in float are mapped from
    disk, read-only, in the type they have. A weight that GPTQ (versions 1 and 2, act-order too), AWQ, bitsandbytes or
    compressed-tensors wrote becomes one `QTensor` under its name, whose codes, scales and zero points are the file's.

    Args:
      path: a folder, a safetensors file, or the index of several (`model.safetensors.index.json`).

    Returns:
      The tree, such as `{"model": {"norm": {"weight": array}, ...}}`.

    Raises:
      FileError: a file is broken, or holds weights in a format that is not supported; it names the tensor.
      OSError: a file cannot be read.
    """
    checkpoint = open_checkpoint(path)
    settings = _quantization(checkpoint)
    weights, parts = ({}, set()) if settings is None else _weights(checkpoint, _layout(settings))
    others = {name: _read(checkpoint, name) for name in checkpoint.names if name not in parts}
    return nested({**weights, **others}, checkpoint.path)


def _weights(checkpoint: Checkpoint, layout: Layout) -> tuple[dict[str, QTensor], set[str]]:
    """The weights in codes, and the names of the tensors that they are made of."""
    dtype = float_dtype(Settings(str(checkpoint.path.parent / "config.json"), checkpoint.config))
    stems = {stem: None for name in checkpoint.names if (stem := _stem(name, layout.suffixes)) is not None}
    weights = {f"{stem}weight": layout.read(Parts(checkpoint, stem, dtype)) for stem in stems}
    return weights, {stem + suffix for stem in stems for suffix in (*layout.suffixes, "weight")}


def _read(checkpoint: Checkpoint, name: str) -> Shaped[np.ndarray, "..."]:
    if _stem(name, _CODES) is not None:
        raise FileError(
            f"{checkpoint.path}: tensor {name!r} holds codes or scales, and the config beside it does not say how to "
            "read them. Put the checkpoint's own config.json there."
        )
    return checkpoint.read(name)


def _stem(name: str, suffixes: tuple[str, ...]) -> str | None:
    """What a name begins with where it ends with one of the suffixes, as a whole word."""
    for suffix in suffixes:
        if name == suffix or name.endswith("." + suffix):
            return name.removesuffix(suffix)
    return None


def _quantization(checkpoint: Checkpoint) -> Settings | None:
    """The settings of a checkpoint's quantization, which AutoGPTQ once wrote to a file of its own; or None."""
    own, beside = checkpoint.path.parent / "config.json", checkpoint.path.parent / "quantize_config.json"
    if checkpoint.config.get("quantization_config") is not None:
        return Settings(str(own), checkpoint.config).section("quantization_config")
    return Settings(str(beside), {"quant_method": "gptq", **read_object(beside)}) if beside.exists() else None


def _layout(settings: Settings) -> Layout:
    return READERS[settings.among("quant_method", tuple(READERS))](settings)
