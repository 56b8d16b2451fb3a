"""Reads the parts of a GGUF header one after the other, and none beyond the end of the file."""

import dataclasses
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Shaped

from jaxquant.errors import FileError
from jaxquant.files.gguf.values import NUMBERS


@dataclasses.dataclass(frozen=True)
class Reader:
    """A file that is read from front to back.

    Args:
      path: of the file.
      file: where it is open.
      size: its bytes.
    """

    path: Path
    file: BinaryIO
    size: int

    def error(self, problem: str) -> FileError:
        """What is wrong with the file, as an error."""
        return FileError(f"{self.path}: {problem}")

    def demand(self, count: int, what: str) -> None:
        """Raises if the file has fewer bytes left than that.

        Raises:
          FileError: saying what would take them, and where.
        """
        at = self.file.tell()
        if count > self.size - at:
            raise self.error(
                f"{what} at byte {at} would take {count} bytes, and the file ends at byte {self.size}. It is cut short "
                "or damaged: fetch it again."
            )

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        self.demand(count, what)
        data = self.file.read(count)
        if len(data) < count:
            raise self.error(f"{what} could not be read whole: the file became shorter meanwhile.")
        return data

    def number(self, width: int, what: str) -> int:
        """The next whole number, of so many bytes and no sign."""
        return int.from_bytes(self.take(width, what), "little")

    def text(self, what: str) -> str:
        """The next text: its length, then UTF-8."""
        data = self.take(self.number(8, what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what}, before byte {self.file.tell()}, is not UTF-8: {error}.") from error

    def numbers(self, kind: int, count: int, what: str) -> Shaped[np.ndarray, " n"]:
        """The next numbers of one of the types of `NUMBERS`."""
        values = np.frombuffer(self.take(count * NUMBERS[kind].itemsize, what), NUMBERS[kind])
        if values.dtype == np.bool_ and np.any(values.view(np.uint8) > 1):
            raise self.error(f"{what}, before byte {self.file.tell()}, has a boolean that is neither 0 nor 1.")
        return values
