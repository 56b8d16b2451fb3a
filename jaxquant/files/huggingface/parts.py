"""What others wrote, read without believing it: the tensors of one weight, and the values of a config."""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, Shaped

from jaxquant.errors import FileError
from jaxquant.files.checkpoint import Checkpoint
from jaxquant.qtensor import QTensor

FLOATS = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tensors of a checkpoint that are together one weight.

    Args:
      checkpoint: where they are.
      stem: what their names begin with, such as `model.layers.0.mlp.up_proj.`.
      dtype: the float that the checkpoint says its weights were, or None.
    """

    checkpoint: Checkpoint
    stem: str
    dtype: Any

    def __contains__(self, suffix: str) -> bool:
        return self.stem + suffix in self.checkpoint.places

    def read(
        self, suffix: str, dtypes: Sequence[str], shape: Sequence[int | None] | None = None
    ) -> Shaped[np.ndarray, "..."]:
        """One of the tensors.

        Args:
          suffix: the rest of its name.
          dtypes: those that it may have.
          shape: that it must have, None for an axis of any length; or None for any shape.

        Raises:
          FileError: it is missing, of another type or of another shape.
        """
        if suffix not in self:
            there = sorted(name for name in self.checkpoint.names if name.startswith(self.stem))
            raise FileError(
                f"{self.checkpoint.path}: tensor {self.stem + suffix!r} is missing, which belongs to "
                f"{', '.join(there[:8])}."
            )
        array = self.checkpoint.read(self.stem + suffix)
        if array.dtype.name not in dtypes:
            raise self.error(suffix, f"is of type {array.dtype.name}, not {' or '.join(dtypes)}")
        fits = shape is None or (
            array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
        )
        if not fits:
            asked = ", ".join("any" if n is None else str(n) for n in shape or ())
            raise self.error(suffix, f"has shape {array.shape}, not ({asked}) as the other tensors of this weight ask")
        return array

    def scales(self, suffix: str, shape: Sequence[int | None] | None = None) -> Shaped[np.ndarray, "..."]:
        """One of the tensors, of finite floats; Args and Raises as `read`."""
        array = self.read(suffix, FLOATS, shape)
        bad = np.argwhere(~np.isfinite(array.astype(np.float32)))
        if len(bad):
            raise self.error(suffix, f"is {array[tuple(bad[0])]} at {bad[0].tolist()}, where a number is needed")
        return array

    def refuse(self, suffix: str) -> None:
        """Raises a FileError if there is such a tensor, because it would be one weight twice."""
        if suffix in self:
            raise self.error(suffix, "is there beside the codes of the same weight; leave one of them out")

    def groups_of(self, suffix: str, inputs: int, groups: int) -> Int32[np.ndarray, " inputs"] | None:
        """The group of each input, or None where there is no such tensor, or one that was never filled in.

        Raises:
          FileError: as `read`; or a group is out of range, or not as large as the others.
        """
        if suffix not in self:
            return None
        index = self.read(suffix, ("int32", "int64"), (inputs,))
        if np.all(index == -1):
            return None
        if np.any((index < 0) | (index >= groups)):
            raise self.error(suffix, f"names the groups {index.min()} to {index.max()}, where there are {groups}")
        sizes = np.bincount(index, minlength=groups)
        if np.any(sizes != inputs // groups):
            raise self.error(suffix, f"puts {sizes.min()} to {sizes.max()} inputs in a group, not {inputs // groups}")
        return index.astype(np.int32)

    def error(self, suffix: str, what: str) -> FileError:
        """An error that names one of the tensors."""
        return FileError(f"{self.checkpoint.path}: tensor {self.stem + suffix!r} {what}.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """An object of a config, whose values may be anything.

    Args:
      where: the file and the keys that lead to it.
      values: what it holds; null is as good as absent.
    """

    where: str
    values: Mapping[str, Any]

    def among(self, key: str, known: Sequence[Any], default: Any = None) -> Any:
        """A value that is one of those known, or the default where it is absent.

        Raises:
          FileError: it is another; the message lists those known.
        """
        value = self._value(key, default)
        if not any(type(value) is type(one) and value == one for one in known):
            raise self.error(key, f"it can be {', '.join(map(repr, known))}")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; or -1, which stands for all there are.

        Raises:
          FileError: it is something else.
        """
        value = self._value(key, default)
        if type(value) is not int or not (value == -1 or 0 < value < 2**31):
            raise self.error(key, "it is a positive whole number, or -1")
        return value

    def section(self, key: str) -> "Settings":
        """An object inside of this one, empty where it is absent.

        Raises:
          FileError: it is something else.
        """
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self.error(key, "it is an object")
        return Settings(f"{self.where}, {key}", value)

    def error(self, key: str, what: str) -> FileError:
        """An error that names one of the values."""
        return FileError(f"{self.where}: {key!r} is {reprlib.repr(self.values.get(key))}: {what}.")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a checkpoint holds weights in codes.

    Args:
      suffixes: what the names of tensors end with that are parts of such a weight and of nothing else.
      read: makes one weight of its tensors.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Parts], QTensor]


def float_dtype(settings: Settings) -> Any:
    """The float that a config says its weights are, or None where it does not say."""
    key = "torch_dtype" if settings.values.get("torch_dtype") is not None else "dtype"
    name = settings.among(key, (*FLOATS, "auto"), "auto")
    return None if name == "auto" else jnp.dtype(name)
