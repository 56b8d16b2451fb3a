"""`calibrate`: one pass over some data, and the statistics of what every weight is multiplied with."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxquant.adapter import entered, is_adapted, is_leaf
from jaxquant.errors import CalibrationError, NonFiniteError, StatsError, UnseenError
from jaxquant.params import is_matrix
from jaxquant.stats import Stats, observe
from jaxquant.transforms.meetings import watch
from jaxquant.transforms.observe import Look, Seen, spread_taken
from jaxquant.transforms.watch import Observations, Sight, observed
from jaxquant.turned import upright


def calibrate(
    fn: Callable,
    params: PyTree,
    batches: Iterable[Any],
    *,
    gram: bool = True,
    where: Callable[[str, Array], bool] = is_matrix,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Stats]:
    """Runs a function over batches and gathers the statistics of the inputs of every matmul's weight.

        stats[path] = sum over batches and tokens x of (1, |x|, x x^T, ...),  max of |x|

    The step is compiled once for each shape of a batch and folds the statistics on the device. It takes the memory of
    the forward pass and 4 in^2 bytes for each Gram matrix; weights fed by one array share one (SmolLM2: 0.75 of the
    float32 model). With `where` a large model is calibrated some layers at a time, and `quantize_sequentially` holds
    one Gram matrix at a time.

    Args:
      fn: the function to be quantized, not yet wrapped in `quantized`.
      params: its first argument. QTensors in it are observed after the transforms of their inputs. A turned
        weight has the statistics of the upright one, of which a copy is made for the time of the call, and one with
        an adapter those of its base, with the adapter at work.
      batches: what `fn` takes besides: a tuple is several positional arguments, anything else is one. With
        `jax.ShapeDtypeStruct`s nothing is computed: the statistics are zeros that know the axes of each weight.
      gram: whether to gather Gram matrices, which `gptq`, `awq` and importance-weighted ranges need.
      where: `(path, array) -> bool`, which arrays to observe; by default those `quantize_params` would quantize.
      progress: wraps the iteration, for example `rich.progress.track` or `tqdm.tqdm`.

    Returns:
      The `Stats` of each weight that met a matmul, by its path; a stacked weight has those of each of its matrices. A
      weight that is also looked up is seen where it is multiplied alone.

    Raises:
      CalibrationError: there was no batch, or one that `fn` cannot take or that failed to come.
      NonFiniteError: a batch made the inputs of a weight NaN or infinite.
      UnseenError: a weight is used in a way that hides which of its axes are contracted.
      NoMatchError: `where` chose nothing.
    """
    watched = watch(jax.tree.map(_entered, params, is_leaf=is_leaf), where)
    look = functools.partial(observe, gram=gram)
    steps: dict[Hashable, Callable] = {}
    totals: dict[tuple[Sight, ...], list[Seen]] = {}  # batches may take different ways through the function
    count = 0
    for batch in _arriving(progress(batches)):
        args = batch if isinstance(batch, tuple) else (batch,)
        try:
            if (kind := _kind(args)) not in steps:
                steps[kind] = _step(fn, watched, args, look)
            seen = steps[kind](totals, args)
        except Exception as error:  # whatever the function's framework raises
            if type(error).__module__.startswith("jaxquant"):
                raise
            raise CalibrationError(f"batch {count} does not fit the function: {error!r}") from error
        _check_finite(seen, count)
        totals[seen.sights], count = seen.records, count + 1
    if not count:
        raise CalibrationError("there was no batch: give an iterable of the inputs that the function takes.")
    return _by_path(totals)


def _entered(leaf: Any) -> Any:
    """A weight in codes as it was before `turned`, an adapter taken apart; arrays stay as they are."""
    enter = entered if is_adapted(leaf) else upright
    # Of shapes there are only shapes: nothing is computed on them, and nothing could be.
    return jax.eval_shape(enter, leaf) if any(map(_is_shape, jax.tree.leaves(leaf))) else enter(leaf)


def _arriving(batches: Iterable) -> Iterable:
    """The batches, with an error that says how many came before it where one fails to come."""
    count, source = 0, iter(batches)
    while True:
        try:
            batch = next(source)
        except StopIteration:
            return
        except Exception as error:
            raise CalibrationError(f"batch {count} failed to come, after {count} good ones: {error!r}") from error
        yield batch
        count += 1


def _kind(args: Sequence) -> Hashable:
    """What a compiled step depends on: the shapes of a batch, and its values where they are no arrays."""
    leaves, treedef = jax.tree.flatten(args)
    return treedef, tuple((x.shape, x.dtype, _is_shape(x)) if hasattr(x, "shape") else x for x in leaves)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _step(fn: Callable, watched: PyTree, args: Sequence, look: Look) -> Callable:
    """`(totals, args) -> Observations`, whose records are added to the total of their kind, if there is one."""
    inputs, run = observed(fn, watched, args, look)
    n_args = sum(hasattr(leaf, "shape") for leaf in jax.tree.leaves(args))
    held = inputs[: len(inputs) - n_args]
    nothing = jax.eval_shape(run, inputs)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: list[Seen], held: list, batch: list) -> Observations:
        seen = run([*held, *batch])
        both = [old.merge(new) for old, new in zip(total, seen.records, strict=True)]
        return Observations(both, seen.sights)

    def step(totals: Mapping[tuple[Sight, ...], list[Seen]], args: Sequence) -> Observations:
        zeros = lambda part: jnp.zeros(part.shape, part.dtype)  # noqa: E731
        total = totals.get(nothing.sights) or jax.tree.map(zeros, nothing.records)
        batch = [leaf for leaf in jax.tree.leaves(args) if hasattr(leaf, "shape")]
        return Observations(total, nothing.sights) if any(map(_is_shape, batch)) else add(total, held, batch)

    return step


def _check_finite(seen: Observations, batch: int) -> None:
    finite = [bool(one) for one in _are_finite(seen.records)]
    for sight in seen.sights:
        if not all(finite[key] for key in sight.keys):
            raise NonFiniteError(f"batch {batch} makes the inputs of {sight.path} NaN or infinite: leave it out.")


@jax.jit
def _are_finite(records: list[Seen]) -> list[Array]:
    """Whether each record is finite; squares overflow before sums of sizes do."""
    parts = [[part for part in (seen.stats.abssum, seen.stats.gram) if part is not None] for seen in records]
    return [functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(part)) for part in some]) for some in parts]


def _by_path(totals: Mapping[tuple[Sight, ...], list[Seen]]) -> dict[str, Stats]:
    """The statistics of each parameter, put together from where it was met."""
    pieces: dict[str, dict] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for sights, records in totals.items():
        for path, shape, taken, keys in sights:
            shapes[path], of_path = shape, pieces.setdefault(path, {})
            found = [of_path[taken]] if taken in of_path else []
            of_path[taken] = _merged(path, [*found, *(records[key].stats for key in keys)])
    return {path: _whole(path, found, shapes[path]) for path, found in pieces.items()}


def _merged(path: str, found: list[Stats]) -> Stats:
    try:
        return functools.reduce(Stats.merge, found)
    except StatsError as error:
        raise StatsError(f"{path}: {error}") from None


def _whole(path: str, pieces: Mapping, shape: tuple[int, ...]) -> Stats:
    try:
        axes, stats = spread_taken(pieces, shape)
    except UnseenError as error:
        raise UnseenError(f"{path}: {error}") from None
    return dataclasses.replace(stats, stack=(*axes, *stats.stack))
