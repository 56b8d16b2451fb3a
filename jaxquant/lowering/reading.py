"""Reads what XLA writes of a compiled program: the optimised HLO, and the PTX of its kernels."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from jaxquant.lowering.program import Collective, Multiplication

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (\([^=]*?\)|\S+) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+[0-9][\w]*|pred)\[([\d,]*)\]")
_TYPE = re.compile(r"\.(f64|f32|f16|bf16|tf32|s32|s8|u8|s4|u4|e4m3|e5m2)\b")
# Results that are names for memory that is there already.
_NAMES = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call"}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: the operands by name, and what stands after them."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in what stands after the operands, or nothing."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


Computations = Mapping[str, Sequence[Instruction]]


def computations(hlo: str) -> Computations:
    """The instructions of every computation, by its name."""
    found, current = {}, []
    for line in hlo.splitlines():
        if line.endswith("{") and (name := re.match(r"(?:ENTRY )?%?(\S+) \(", line)):
            current = found.setdefault(name[1], [])
        elif match := _INSTRUCTION.match(line):
            operands, _, rest = match[4].partition(")")
            current.append(Instruction(match[1], match[2], match[3], tuple(re.findall(r"%([^\s,]+)", operands)), rest))
    return found


def multiplications(found: Computations, kernels: Mapping[str, Counter]) -> list[Multiplication]:
    """Every matmul: instructions, fusions that hold one, kernels, and sums of products that came from one."""
    inside = _fused(found)
    reads = []
    for name in found:
        if name not in inside:
            shapes = {one.name: one.shape for one in found[name]}
            reads += [_multiplication(one, shapes, found, kernels) for one in found[name]]
    return [read for read in reads if read is not None]


def _fused(found: Computations) -> set[str]:
    calls = (one.attribute(r"(?:calls|to_apply)=%?([^\s,]+)") for body in found.values() for one in body)
    return {name for name in calls if name}


def _multiplication(one: Instruction, shapes: Mapping, found: Computations, kernels: Mapping) -> Multiplication | None:
    operands = [_plain(shapes.get(name, "")) for name in one.operands][:2]
    body = found.get(one.attribute(r"calls=%?([^\s,]+)"), ())
    how = _how(one, operands, body)
    if not how:
        return None
    scopes = [_scope(inner) for inner in body if inner.operation in ("dot", "reduce")] or [_scope(one)]
    kernel = one.attribute(r'name = "([^"]+)"') or re.sub(r"[^\w]", "_", one.name)
    used = kernels.get(kernel, Counter())
    return Multiplication("; ".join(dict.fromkeys(scopes)), tuple(operands), how, ", ".join(sorted(used)))


def _scope(one: Instruction) -> str:
    return one.attribute(r'op_name="([^"]*)"')


def _how(one: Instruction, operands: Sequence[str], body: Sequence[Instruction]) -> str:
    target = one.attribute(r'custom_call_target="([^"]+)"')
    if target.endswith("gpu.triton"):
        return "Triton kernel of jaxquant"
    if target.startswith("__cublas"):
        return "cuBLAS"
    if one.operation == "dot":
        return "loop"
    operations = {inner.operation for inner in body}
    if one.operation != "fusion" or not operations & {"dot", "reduce"}:
        return ""
    if "dot" in operations:
        return "Triton fusion of XLA" if "__triton" in one.rest else "loop"
    # A matmul of one row: products that are added up, which came from a matmul, or from codes.
    scope = _scope(one)
    of_codes = scope.endswith("reduce_sum") and any(re.match(r"(s8|s4|s2|f8\w+)\[", shape) for shape in operands)
    summed = "multiply" in operations and (of_codes or scope.endswith("dot_general"))
    return "reduction" if summed and _elements(one.shape) > 1 else ""


def tensor_cores(ptx: Iterable[str]) -> dict[str, Counter]:
    """The tensor-core instructions of every kernel, by the name of the kernel."""
    found: dict[str, Counter] = {}
    for text in ptx:
        for name, body in re.findall(r"\.entry (\w+)\((.*?)(?=\.entry |\Z)", text, flags=re.DOTALL):
            lines = re.findall(r"\b((?:mma\.sync|wgmma\.mma_async)\.[\w.]+)", body)
            found.setdefault(name, Counter()).update(map(_instruction, lines))
    return found


def _instruction(line: str) -> str:
    """`wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8` is `wgmma s32.s8.s8`."""
    types = _TYPE.findall(line)
    accumulator, operands = types[0], types[1:3]
    return f"{line.split('.')[0]} {'.'.join([accumulator, *operands])}"


def buffers(found: Computations, count: int = 8) -> list[tuple[str, int]]:
    """The largest results that are written to memory, each shape once."""
    inside, sizes = _fused(found), {}
    for name, body in found.items():
        for one in body if name not in inside else ():
            if one.operation not in _NAMES:
                sizes |= {f"{kind}[{dims}]": _bytes(kind, dims) for kind, dims in _SHAPE.findall(one.shape)}
    return sorted(sizes.items(), key=lambda item: item[1], reverse=True)[:count]


def collectives(found: Computations) -> list[Collective]:
    """Communication between devices, equal ones counted together."""
    counts = Counter(
        (kind, _plain(one.shape))
        for body in found.values()
        for one in body
        for kind in _COLLECTIVES
        if one.operation in (kind, f"{kind}-start")
    )
    return [Collective(kind, shape, count) for (kind, shape), count in counts.items()]


def _plain(shape: str) -> str:
    """A shape without its layout."""
    return ", ".join(f"{kind}[{dims}]" for kind, dims in _SHAPE.findall(shape))


def _elements(shape: str) -> int:
    return max((_product(dims) for _, dims in _SHAPE.findall(shape)), default=0)


def _product(dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n)


def _bytes(kind: str, dims: str) -> int:
    bits = _BITS.get(kind) or int(re.findall(r"\d+", kind)[0])
    return _product(dims) * bits // 8
