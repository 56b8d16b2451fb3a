"""`explain`: what `quantized(fn)` does with every parameter, as a table and as records."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxquant import matmul, table, trace
from jaxquant.adapter import entered, is_leaf
from jaxquant.format import Format, int8
from jaxquant.lowering import Program, lower_for
from jaxquant.matmul import Meeting
from jaxquant.transforms.quantized import quantized
from jaxquant.turned import straightened

_COLOURS = {matmul.INTEGER: "green", matmul.WEIGHT_ONLY: "yellow", matmul.FLOAT: "red"}
_COLUMNS = ("parameter", "operation", "activations", "weight", "format", "arithmetic", "why")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One row for each operation that met a parameter; `print` shows the table, `rich.print` shows it in colour.

    Args:
      meetings: the rows in the order of the program. A loop's body is shown once.
      unmet: paths of parameters that were quantized and never met a matmul, a convolution or a look-up.
      program: what a compiler made of it, where a target was given.
    """

    meetings: tuple[Meeting, ...]
    unmet: tuple[str, ...]
    program: Program | None = None

    @property
    def records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries, one key a field of `Meeting`, and `compiled` where there is a program."""
        rows = [dataclasses.asdict(meeting) for meeting in self.meetings]
        if self.program is None:
            return rows
        return [row | {"compiled": text} for row, text in zip(rows, self._compiled(self.program), strict=True)]

    def __str__(self) -> str:
        return "\n".join([*self._table(), *self._unmet()])

    def __rich__(self) -> str:
        header, *body = self._table()
        colours = [_COLOURS.get(meeting.arithmetic) for meeting in self.meetings]
        painted = [table.painted(*pair) for pair in zip(body, colours, strict=True)]
        return "\n".join([header, *painted, *(table.painted(line, None) for line in self._unmet())])

    def _table(self) -> list[str]:
        rows = [_cells(meeting) for meeting in self.meetings]
        if self.program is None:
            return table.lines(_COLUMNS, rows)
        pairs = zip(rows, self._compiled(self.program), strict=True)
        return table.lines((*_COLUMNS, "compiled"), [(*row, text) for row, text in pairs])

    def _compiled(self, program: Program) -> list[str]:
        """The matmuls of the program that came from each row, in words."""
        words = []
        for meeting in self.meetings:
            scope = f"[{meeting.path}]"
            known = meeting.path and meeting.operation != "gather"
            found = [one for one in program.multiplications if known and scope in one.scope]
            words.append([f"{one.how}, {one.tensor_cores or 'no tensor cores'}" for one in found])
        return ["; ".join(dict.fromkeys(row)) for row in words]

    def _unmet(self) -> list[str]:
        return [f"{path}: quantized, but it never met a matmul" for path in self.unmet]


def explain(
    fn: Callable,
    params: PyTree,
    *args: Any,
    activations: Format | None = int8,
    outliers: int = 0,
    target: str | None = None,
    **kwargs: Any,
) -> Explanation:
    """Tells how `quantized(fn, activations=activations)(params, *args)` computes every matmul.

    Nothing is computed: the function is traced, so arguments may be `jax.ShapeDtypeStruct`s.

    Args:
      fn: the function, not yet wrapped in `quantized`.
      params: its first argument, with `QTensor`s in it; arrays that were left in floating point are listed too, and
        matmuls of activations with activations, whose path is empty.
      *args, **kwargs: its other arguments.
      activations, outliers: as for `quantized`.
      target: a GPU to compile it for, as `lower_for` takes it; adds what the compiler did with each parameter.

    Returns:
      An `Explanation`: per operation the parameter's path, the shapes, the formats, the arithmetic and the reason
      where it is not `int8 x int8 -> int32`.

    Raises:
      OptionError, MissingPackageError, CompileError: as `lower_for`.
    """
    meetings: list[Meeting] = []
    rules = _watching(matmul.rules(activations, outliers, meetings.append), meetings.append)
    watched = jax.tree.map(_watch, params, is_leaf=is_leaf)
    leaves, _ = jax.tree_util.tree_flatten_with_path(((params, *args), kwargs), is_leaf=is_leaf)
    straight = straightened(fn, [leaf for _, leaf in leaves])
    staged = trace.stage(straight, rules, (watched, *args), kwargs)
    jax.eval_shape(lambda *inputs: trace.walk(staged.jaxpr, inputs, rules), *staged.inputs)
    in_codes = [trace.argument_name(path) for path, leaf in leaves if is_leaf(leaf)]
    met = {meeting.path for meeting in meetings if meeting.activations is not None}
    program = None
    if target is not None:
        program = lower_for(target, functools.partial(_serve, fn, activations, outliers, kwargs), params, *args)
    return Explanation(tuple(meetings), tuple(path for path in in_codes if path not in met), program)


def _serve(fn: Callable, activations: Format | None, outliers: int, kwargs: dict[str, Any], *args: Any) -> Any:
    return quantized(fn, activations=activations, outliers=outliers)(*args, **kwargs)


def _watching(rules: trace.Rules, record: Callable[[Meeting], None]) -> trace.Rules:
    """The rules of `quantized`, which also follow arrays left in floating point, and see matmuls without either."""

    def decode(param: trace.Param, why: str) -> Array:
        return rules.decode(param, why) if matmul.is_param(param.value) else param.value.array

    def is_param(leaf: Any) -> bool:
        return matmul.is_param(leaf) or isinstance(leaf, trace.Plain)

    def untouched(name: str, inputs: Sequence[Any]) -> None:
        if name in rules.operations and name != "gather":
            x, y = inputs[:2]
            dtypes = (jnp.dtype(y.dtype).name, jnp.dtype(x.dtype).name)
            record(Meeting("", name, x.shape, y.shape, *dtypes, matmul.FLOAT, "both operands are activations"))

    return dataclasses.replace(rules, is_param=is_param, decode=decode, untouched=untouched)


def _watch(leaf: Any) -> Any:
    if is_leaf(leaf):
        return entered(leaf)
    floating = hasattr(leaf, "dtype") and hasattr(leaf, "ndim") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return trace.Plain(leaf) if floating and leaf.ndim >= 2 else leaf


def _cells(meeting: Meeting) -> Sequence[str]:
    activations = "" if meeting.activations is None else f"{list(meeting.activations)} {meeting.activation_format}"
    weight = str(list(meeting.weight))
    return (
        meeting.path or "-",
        meeting.operation,
        activations,
        weight,
        meeting.weight_format,
        meeting.arithmetic,
        meeting.reason,
    )
