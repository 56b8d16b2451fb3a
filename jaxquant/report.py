"""`report`: what quantizing did to every parameter, as a table and as records."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant import table
from jaxquant.encode import fit, write
from jaxquant.errors import NoMatchError
from jaxquant.format import Format
from jaxquant.learned import plain
from jaxquant.matrices import Matrices
from jaxquant.params import axes_of, is_bundle
from jaxquant.qtensor import QTensor, decode
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
      of_nearest: the output's (or the weight's) squared error as a share of that of nearest rounding to the same codes
        or levels, in the same groups, in the whole range of each group.
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
      qparams: what `quantize_params` made of them, or what `load_gguf` and the like read; a turned weight has the row
        of the upright one, and one with an adapter that of the codes beside it.
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
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_bundle)
    return {path_name(path): plain(leaf) for path, leaf in leaves}


def _row(path: str, w: Array, q: QTensor, stats: Stats | None, axes: Matrices, arithmetic: str, reason: str) -> Row:
    known = stats if stats is not None and stats.gram is not None else None
    signal, error, output, output_error, nearest = (float(x) for x in _errors(w, q, known, axes))
    best = output_error if known is not None else error
    # Not more exactly: a fused multiply-add rounds once less. Also where it is no number.
    same = not abs(best - nearest) > 1e-4 * nearest
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
        of_nearest=best / nearest if nearest else 1.0,
        arithmetic=arithmetic,
        notes="; ".join(notes),
    )


def _errors(w: Array, q: QTensor, stats: Stats | None, axes: Matrices) -> tuple[Array, ...]:
    """`|w|^2`, `|D|^2`, `tr(W^T H W)`, `tr(D^T H D)`, and the last of nearest rounding."""
    w = w.astype(jnp.float32)
    d, r = axes.take(w - decode(q.astype(jnp.float32))), axes.take(_rest(w, q))
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


@jax.jit
def _rest(w: Array, q: QTensor) -> Array:
    """What nearest rounding leaves of an array, in the groups that the scale of a `QTensor` is for."""
    split = [size for groups, n in zip(q.scale.shape, w.shape, strict=True) for size in (groups, n // max(groups, 1))]
    members, over = w.reshape(split), tuple(range(1, 2 * w.ndim, 2))
    if q.levels is None:
        dtype = None if q.is_integer else q.codes.dtype
        format = Format(bits=q.bits, symmetric=q.zero is None, dtype=dtype)
        rest = members - decode(write(members, *fit(members, format, over), format))
    else:
        rest = _rest_of_levels(members, over, q.levels)
    return rest.reshape(w.shape)


def _rest_of_levels(members: Array, over: tuple[int, ...], levels: tuple[float, ...]) -> Array:
    """The same for a codebook. Those of files reach further than a `Format`'s, or have two zeros."""
    scale = jnp.max(jnp.abs(members), over, keepdims=True, initial=0.0) / max(map(abs, levels))
    nearer = lambda a, b: jnp.where(jnp.abs(b) < jnp.abs(a), b, a)  # noqa: E731
    return functools.reduce(nearer, (members - level * scale for level in levels))


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
