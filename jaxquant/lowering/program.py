"""`Program`: what a compiler made of a function, in numbers and as a table."""

import dataclasses
from typing import Any

from jaxquant import table


@dataclasses.dataclass(frozen=True)
class Multiplication:
    """One matmul of the compiled program.

    Args:
      scope: `op_name` of the operation it came from; a parameter's path stands in it as `[path]`.
      operands: what is multiplied, such as `("s8[16,4096]", "s4[4096,4096]")`.
      how: `Triton kernel of jaxquant`, `Triton fusion of XLA`, `cuBLAS`, `reduction`, `loop`.
      tensor_cores: the instruction of its kernel, such as `wgmma s32.s8.s8`; empty where it has none.
    """

    scope: str
    operands: tuple[str, ...]
    how: str
    tensor_cores: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication between devices: its kind, what it moves, and how many of them there are."""

    kind: str
    shape: str
    count: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program of one device: what it takes, and what it does. `print` shows it all.

    Args:
      target, devices: what it was compiled for.
      memory_bytes: of one device.
      argument_bytes, output_bytes, temp_bytes: what it holds while it runs; `alias_bytes` of the outputs lie in
        donated arguments.
      tensor_cores: instructions that occur in its kernels, and how often, such as `{"wgmma s32.s8.s8": 8}`.
      multiplications: every matmul; a loop's body is shown once.
      buffers: the largest results that are written to memory, `(shape, bytes)`.
      collectives: communication.
    """

    target: str
    devices: int
    memory_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    tensor_cores: dict[str, int]
    multiplications: tuple[Multiplication, ...]
    buffers: tuple[tuple[str, int], ...]
    collectives: tuple[Collective, ...]

    @property
    def total_bytes(self) -> int:
        """Arguments, outputs and temporaries together."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    @property
    def fits(self) -> bool:
        """Whether all of it lies in the memory of the device."""
        return self.total_bytes <= self.memory_bytes

    @property
    def record(self) -> dict[str, Any]:
        """The fields as a dictionary, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Program":
        """The inverse of `record`."""
        many = {
            "multiplications": tuple(
                Multiplication(**{**one, "operands": tuple(one["operands"])}) for one in record["multiplications"]
            ),
            "collectives": tuple(Collective(**one) for one in record["collectives"]),
            "buffers": tuple((shape, size) for shape, size in record["buffers"]),
        }
        return cls(**{**record, **many})

    def __str__(self) -> str:
        room = "fits" if self.fits else "does not fit"
        new = self.output_bytes - self.alias_bytes
        sizes = {"arguments": self.argument_bytes, "outputs": new, "temporaries": self.temp_bytes}
        parts = " + ".join(f"{size / 1e9:.3f} GB of {name}" for name, size in sizes.items())
        rows = [(one.how, " x ".join(one.operands), one.tensor_cores, one.scope) for one in self.multiplications]
        return "\n".join(
            [
                f"{self.target} x {self.devices}: {parts}, {room} in {self.memory_bytes / 1e9:.1f} GB",
                *table.lines(("how", "operands", "tensor cores", "from"), rows),
                "largest results: " + ", ".join(f"{shape} ({size / 1e6:.1f} MB)" for shape, size in self.buffers),
                "communication: " + (", ".join(f"{c.count} {c.kind} {c.shape}" for c in self.collectives) or "none"),
            ]
        )
