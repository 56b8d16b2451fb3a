"""The walk that watches: a function evaluated as it is, and a record of the inputs of every weight that is followed."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree

from jaxquant import trace
from jaxquant.qtensor import is_qtensor
from jaxquant.stats import Stats
from jaxquant.trace import Equation, Param, Recorded
from jaxquant.transforms.meetings import Meet, Tokens, rules
from jaxquant.transforms.observe import Look, Seen, arrange


class Sight(NamedTuple):
    """Where the records of a parameter are; it was met as a whole, or by fixed indices `taken` of its stack."""

    path: str
    shape: tuple[int, ...]
    taken: tuple[tuple[int, int], ...]
    keys: tuple[int, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["records"], meta_fields=["sights"])
@dataclasses.dataclass(frozen=True)
class Observations:
    """What one batch showed: a record for each different input, and which parameters it is an input of."""

    records: list[Seen]
    sights: tuple[Sight, ...]


def observed(fn: Callable, watched: PyTree, args: Sequence, look: Look) -> tuple[list, Callable]:
    """Stages `fn` for a batch.

    Returns:
      The inputs, and a function of them (to be jitted) that runs `fn` and returns `Observations`.
    """
    staged = trace.stage(fn, rules(_watching(look, {})), (watched, *args), {})

    def run(inputs: Sequence) -> Observations:
        sights: dict[tuple, dict[Hashable, None]] = {}
        _, records = trace.record(staged.jaxpr, inputs, rules(_watching(look, sights)))
        number = {key: i for i, key in enumerate(records)}
        found = [
            Sight(path, shape, taken, tuple(number[key] for key in keys))
            for (path, shape, taken), keys in sights.items()
        ]
        return Observations(list(records.values()), tuple(found))

    return staged.inputs, run


def _looked(look: Look, transformed: bool, tokens: Array) -> Stats:
    return dataclasses.replace(look(tokens), transformed=transformed)


def _watching(look: Look, sights: dict[tuple, dict[Hashable, None]]) -> Meet:
    """Looks at the tokens of every meeting of one trace, and lists in `sights` who met which record."""
    seen: dict[Hashable, tuple[Any, Hashable]] = {}

    def meet(param: Param, tokens: Tokens, inputs: Sequence, at: Equation, view: Callable) -> Recorded:
        to, origin = arrange(param, tokens.batch, tokens.contracted, tokens.rest), param.origin
        assert origin is not None
        # Who meets an array in the same way as another before shares its record: q, k and v of an attention.
        others = [param.index, param.value if is_qtensor(param.value) else None, *(x for x in inputs if x is not param)]
        way = (at.place.body, *map(id, others), tokens.axes, to, origin.looped, origin.indexed)
        key = (param.path, origin.taken, at.place.address)
        records: dict[Hashable, Seen] = {}
        if way not in seen or seen[way][1] == key:  # a body that is traced twice records twice, under one key
            seen[way] = (others, key)  # with the arrays, so that their ids stay their own
            of_codes = is_qtensor(param.value) and (bool(param.value.transform) or param.value.kept is not None)
            records[key] = view(tokens.x, to, param, functools.partial(_looked, look, of_codes))
        sights.setdefault((param.path, origin.shape, origin.taken), {})[seen[way][1]] = None
        return Recorded(records)

    return meet
