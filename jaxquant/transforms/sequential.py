"""`quantize_sequentially`: each weight is calibrated on the outputs of the quantized weights before it.

for each matmul, in the order of the program:   stats = observe(x),   q = quantizer(w, stats),   y = x @ decode(q)
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxquant import trace
from jaxquant.adapter import is_adapted
from jaxquant.errors import AdapterError, CalibrationError, NotQuantizableError, ShapeError, UnseenError
from jaxquant.format import Format
from jaxquant.matrices import Matrices, write
from jaxquant.params import is_matrix
from jaxquant.qtensor import QTensor, decode, is_qtensor
from jaxquant.quantizers import Quantizer, as_quantizer
from jaxquant.sharding import on_shards
from jaxquant.stats import Stats, observe
from jaxquant.trace import Equation, Param, Plain, Recorded, views
from jaxquant.transforms.meetings import Meet, Tokens, rules, watch
from jaxquant.transforms.observe import Arrangement, Seen, arrange, spread_taken
from jaxquant.turned import is_in_codes, upright


def quantize_sequentially(
    fn: Callable,
    params: PyTree,
    batches: Iterable[Any],
    quantizer: Quantizer | Format,
    *,
    where: Callable[[str, Array], bool] = is_matrix,
    gram: bool = True,
    tell: Callable[[str], None] = lambda path: None,
) -> PyTree:
    """Calibrates and quantizes in one pass over the program, each weight on what the quantized ones before it put out.

    What GPTQ's authors do layer by layer, for any function: its equations are evaluated one after the other on all
    batches at once, and where a weight is met it is quantized, and used so from there on. One Gram matrix is held at
    a time, and the activations of all batches at one place of the program. Loops over stacked weights (`scan`) are
    compiled; everything else runs as it comes, so do not jit this.

    Args:
      fn, params, batches, where, gram: as for `calibrate`; the batches are of one shape, and several are
        stacked and mapped over by `vmap`. What is in codes already, turned or not, has to be left out with `where`;
        it is used decoded, and stays as it is.
      quantizer: as for `quantize_params`.
      tell: hears the path of each weight that is about to be quantized.

    Returns:
      The parameters, with QTensors for those that were chosen.

    Raises:
      AdapterError: a leaf has an adapter.
      CalibrationError: there was no batch, or their shapes differ.
      NotQuantizableError: a chosen leaf is in codes already.
      ShapeError: a shard of a chosen leaf would cut through a group.
      UnseenError: a chosen weight never meets a matmul, or does so in several turns of a loop or in a branch, where
        not all of its inputs are there at once: use `calibrate` for those.
    """
    _check_bare(params)
    quantizer = as_quantizer(quantizer)
    rows = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    args = _stacked(rows)
    mapped = fn if len(rows) == 1 else jax.vmap(fn, in_axes=(None,) + (0,) * len(args))
    watched = watch(jax.tree.map(upright, params, is_leaf=is_in_codes), functools.partial(_chooses, where))

    def whole(params: PyTree, *args: Any) -> tuple:
        mapped(params, *args)
        return ()

    do = rules(_quantizing(quantizer, functools.partial(observe, gram=gram), tell))
    staged = trace.stage(whole, do, (watched, *args), {})
    _, records = trace.record(staged.jaxpr, staged.inputs, do)
    done = _replaced(watched, records)
    return jax.tree.map(lambda old, new: old if is_in_codes(old) else new, params, done, is_leaf=is_in_codes)


def _check_bare(params: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapted):
        if is_adapted(leaf):
            raise AdapterError(
                f"{trace.path_name(path)} has an adapter: merge_lora it, or quantize jq.split_lora(params)[1] and "
                "jq.join_lora the adapters to that."
            )


def _chooses(where: Callable[[str, Array], bool], path: str, leaf: Any) -> bool:
    chosen = bool(where(path, leaf))
    if chosen and is_qtensor(leaf):
        raise NotQuantizableError(f"{path} is a {leaf!r} already: leave it out with `where`, or decode it first.")
    return chosen


@functools.partial(jax.tree_util.register_dataclass, data_fields=["q"], meta_fields=["axes", "loops"])
@dataclasses.dataclass(frozen=True)
class Written:
    """A quantized parameter on its way out of the loops that run over it.

    Args:
      q: the codes; their axes are the parameter's `axes`, in this order.
      axes, loops: as in `observe.Seen`.
    """

    q: QTensor
    axes: tuple[int, ...]
    loops: tuple[tuple[int, int], ...]

    def merge(self, other: "Written") -> "Written":
        """The first one: a weight that is met again is met as it was quantized."""
        del other
        return self

    def leave(self, loop: int) -> "Written":
        """Stacked by a loop over the parameter."""
        axis = dict(self.loops)[loop]
        return Written(self.q, (axis, *self.axes), tuple(pair for pair in self.loops if pair[0] != loop))


def _stacked(rows: Sequence[tuple]) -> tuple:
    """All batches as one, their number a new leading axis; a single one as it is."""
    if not rows:
        raise CalibrationError("there was no batch: give an iterable of the inputs that the function takes.")
    if len(rows) == 1:
        return rows[0]
    try:
        return jax.tree.map(lambda *parts: jnp.stack(parts), *rows)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"batches have to be alike to be quantized on together: {error}") from None


def _quantizing(quantizer: Quantizer, look: Callable, tell: Callable[[str], None]) -> Meet:
    """Quantizes the weight of every meeting, and evaluates it on the decoded codes."""
    done: dict[Hashable, QTensor] = {}
    latest: dict[Hashable, tuple[Any, Seen]] = {}  # the last input that was looked at: that of q is that of k and v

    def seen(param: Param, tokens: Tokens, inputs: Sequence, to: Arrangement, at: Equation, view: Callable) -> Seen:
        others = [x for x in inputs if x is not param]
        way = (at.place.body, *map(id, others), tokens.axes, to)
        if way not in latest:
            latest.clear()
            latest[way] = (others, view(tokens.x, to, param, look))
        return latest[way][1]

    def meet(param: Param, tokens: Tokens, inputs: Sequence, at: Equation, view: Callable) -> Recorded:
        if is_qtensor(param.value):  # what was in codes before is used as it is
            return Recorded({})
        origin = param.origin
        to = arrange(param, tokens.batch, tokens.contracted, tokens.rest)
        assert origin is not None
        w = origin.restore(param.value.array)
        if w is None or origin.indexed is not None or len(origin.looped) != at.place.depth:
            raise UnseenError(f"{param.path} does not meet all of its inputs at once: use calibrate, or `where`.")
        left = [axis for axis in range(len(origin.shape)) if axis not in origin.away]
        here = (param.path, origin.taken, at.place.body)
        if here not in done:
            tell(param.path)
            stats = seen(param, tokens, inputs, to, at, view).stats
            stack, contracted = ([left.index(axis) for axis in axes] for axes in (stats.stack, stats.inputs))
            axes = Matrices.of(len(left), stack, contracted)
            done[here] = _written(param.path, w, stats, quantizer, axes)
        shown = origin.show(decode(done[here])).astype(param.value.dtype)
        written = Written(done[here], tuple(left), origin.looped)
        return Recorded({(param.path, origin.taken): written}, [shown if x is param else x for x in inputs])

    return meet


def _written(path: str, w: Array, stats: Stats, quantizer: Quantizer, axes: Matrices) -> QTensor:
    try:
        return on_shards(functools.partial(write, quantizer=quantizer, axes=axes), w, stats)(w)
    except ShapeError as error:
        raise ShapeError(f"{path}: {error}") from None


def _replaced(watched: PyTree, records: Mapping[Any, Written]) -> PyTree:
    """The parameters with what was written in the place of the watched ones."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(watched, is_leaf=lambda leaf: isinstance(leaf, Plain))
    named = [(trace.path_name(path), leaf) for path, leaf in leaves]
    pieces: dict[str, dict] = {}
    for (path, taken), written in records.items():
        pieces.setdefault(path, {})[taken] = written
    unmet = [path for path, leaf in named if isinstance(leaf, Plain) and path not in pieces]
    if unmet:
        raise UnseenError(f"{', '.join(unmet)} never met a matmul: leave them out with `where`.")
    return treedef.unflatten([_assembled(leaf, pieces[path]) if path in pieces else leaf for path, leaf in named])


def _assembled(leaf: Plain, pieces: Mapping[tuple, Written]) -> QTensor:
    front, written = spread_taken(pieces, leaf.shape)
    axes = (*front, *written.axes)
    return views.transpose(written.q, [axes.index(axis) for axis in range(len(axes))])
