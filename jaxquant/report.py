"""`report`: what quantizing did to every parameter, as a table and as records."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant import table
from jaxquant.errors import NoMatchError
from jaxquant.format import Format
from jaxquant.matrices import Matrices, write
from jaxquant.params import axes_of
from jaxquant.qtensor import QTensor, decode
from jaxquant.quantizers import rtn
from jaxquant.stats import Stats, output_error
from jaxquant.trace import path_name
from jaxquant.transforms.explain import explain
from jaxquant.turned import is_in_codes, upright

_COLUMNS = (
    "parameter",
    "shape",
    "format",
    "bits",
    "bytes",
    "SQNR dB",
    "output dB",
    "of nearest",
    "arithmetic",
    "notes",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantized parameter.

    Args:
      path, shape, format: which one, and what it is written in.
      bits: true bits of a weight, with scales, zero points, transforms and kept rows.
      nbytes: true bytes.
      sqnr: `10 log10(|w|^2 / |w - decode(q)|^2)`, in dB.
      output_sqnr: the same of the output, `tr(W^T H W) / tr(D^T H D)`; None without a Gram matrix.
      of_nearest: the output's (or the weight's) squared error as a share of that of nearest rounding.
      arithmetic: how its matmuls are computed.
      notes: what fell back, and why.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    bits: float
    nbytes: int
    sqnr: float
    output_sqnr: float | None
    of_nearest: float
    arithmetic: str
    notes: str


@dataclasses.dataclass(frozen=True)
class Report:
    """One `Row` for each quantized parameter; `print` shows a table, `rich.print` shows it in colour."""

    rows: tuple[Row, ...]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries."""
        return [dataclasses.asdict(row) for row in self.rows]

    @property
    def nbytes(self) -> int:
        """The bytes of all quantized parameters."""
        return sum(row.nbytes for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(table.lines(_COLUMNS, [_cells(row) for row in self.rows]))

    def __rich__(self) -> str:
        header, *body = str(self).splitlines()
        colours = ["yellow" if row.notes else "green" for row in self.rows]
        return "\n".join([header, *(table.painted(*pair) for pair in zip(body, colours, strict=True))])


def report(
    fn: Callable,
    params: PyTree,
    qparams: PyTree,
    stats: Mapping[str, Stats] | None = None,
    *args: Any,
    activations: Format | None = None,
) -> Report:
    """Tells for every quantized parameter how many bits it takes, how exact it is, and what fell back and why.

    Args:
      fn: the function, not wrapped in `quantized`.
      params: the float parameters.
      qparams: what `quantize_params` made of them; a turned weight has the row of the upright one.
      stats: what `calibrate` gave, for the error of the outputs.
      *args: the other arguments of `fn` (shapes are enough), for how its matmuls are computed; left out, so is that.
      activations: as for `quantized`.

    Raises:
      NoMatchError: there is no `QTensor` in `qparams`, or the two trees do not have the same paths.
    """
    floats, codes = (_by_path(tree) for tree in (params, qparams))
    chosen = {path: leaf for path, leaf in codes.items() if is_in_codes(leaf)}
    if not chosen or floats.keys() != codes.keys():
        raise NoMatchError("report: `qparams` has no QTensor, or other paths than `params`: give a tree and its own.")
    met = {path: ("", "") for path in chosen}
    if args:
        for meeting in explain(fn, qparams, *args, activations=activations).meetings:
            if meeting.path in met and meeting.activations is not None:
                met[meeting.path] = (meeting.arithmetic, meeting.reason)
    axes = {path: axes_of(path, leaf, floats.keys(), (stats or {}).get(path)) for path, leaf in chosen.items()}
    return Report(
        tuple(
            _row(path, floats[path], upright(leaf), (stats or {}).get(path), axes[path], *met[path])
            for path, leaf in chosen.items()
        )
    )


def _by_path(tree: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_in_codes)
    return {path_name(path): leaf for path, leaf in leaves}


def _row(path: str, w: Array, q: QTensor, stats: Stats | None, axes: Matrices, arithmetic: str, reason: str) -> Row:
    nearest = write(w, None, quantizer=rtn(format_of(q, axes)), axes=axes)
    known = stats if stats is not None and stats.gram is not None else None
    signal, error, output, output_error, plain = (float(x) for x in _errors(w, q, nearest, known, axes))
    best = output_error if known is not None else error
    same = not best < plain * (1 - 1e-6)  # also where it is no number
    notes = [reason] if reason else []
    notes += ["nearest rounding is kept"] if same and (q.transform or known is not None) else []
    return Row(
        path=path,
        shape=q.shape,
        format=q.description,
        bits=8 * q.nbytes / q.size,
        nbytes=q.nbytes,
        sqnr=_decibels(signal, error),
        output_sqnr=None if known is None else _decibels(output, output_error),
        of_nearest=best / plain if plain else 1.0,
        arithmetic=arithmetic,
        notes="; ".join(notes),
    )


def _errors(w: Array, q: QTensor, nearest: QTensor, stats: Stats | None, axes: Matrices) -> tuple[Array, ...]:
    """`|w|^2`, `|D|^2`, `tr(W^T H W)`, `tr(D^T H D)`, and the last of nearest rounding."""
    w = w.astype(jnp.float32)
    d, r = (axes.take(w - decode(one.astype(jnp.float32))) for one in (q, nearest))
    measure = output_error
    for _ in axes.stack:
        measure = jax.vmap(measure)
    return (
        jnp.sum(jnp.square(w)),
        jnp.sum(jnp.square(d)),
        jnp.sum(measure(axes.take(w), stats)),
        jnp.sum(measure(d, stats)),
        jnp.sum(measure(r, stats)),
    )


def format_of(q: QTensor, axes: Matrices) -> Format:
    """The format a `QTensor` was written in, read off its shapes."""
    groups = math.prod(q.scale.shape[a] for a in axes.inputs)
    inputs = math.prod(q.shape[a] for a in axes.inputs)
    integer = jnp.issubdtype(q.codes.dtype, jnp.integer)
    per_channel = groups > 1 or any(q.scale.shape[a] > 1 for a in axes.outputs)
    return Format(
        bits=q.bits,
        group=inputs // groups if groups > 1 else None,
        symmetric=q.zero is None,
        per_channel=per_channel,
        dtype=None if integer else q.codes.dtype,
        levels=q.levels,
    )


def _decibels(signal: float, error: float) -> float:
    return 10 * float(np.log10(signal / error)) if error > 0 and signal > 0 else math.inf


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.path,
        "x".join(map(str, row.shape)),
        row.format,
        f"{row.bits:.2f}",
        f"{row.nbytes:,}",
        f"{row.sqnr:.1f}",
        "" if row.output_sqnr is None else f"{row.output_sqnr:.1f}",
        f"{row.of_nearest:.1%}",
        row.arithmetic,
        row.notes,
    )
