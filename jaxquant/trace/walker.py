"""`Walker`: what a rule of control flow needs to walk the bodies inside an equation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn

from jaxquant.trace.records import Place, Records


@dataclasses.dataclass(frozen=True)
class Walker:
    """What a control-flow rule needs: how to walk an inner jaxpr, decode a parameter, and bind an equation as it is.

    `recording` walks are never differentiated, so their rules need not keep a user's derivatives.
    """

    evaluate_at: Callable[[Place, ClosedJaxpr, Sequence], tuple[list, Records]]
    decode: Callable[[Any, str], Any]
    bind: Callable[[JaxprEqn, Sequence], list]
    recording: bool = False
    place: Place = dataclasses.field(default_factory=Place)

    def evaluate(self, jaxpr: ClosedJaxpr, inputs: Sequence) -> tuple[list, Records]:
        """Walks an inner jaxpr that is part of the outer one."""
        return self.evaluate_at(self.place, jaxpr, inputs)

    def part(self, jaxpr: ClosedJaxpr, inputs: Sequence, why: str) -> tuple[list, Records]:
        """Walks an inner jaxpr that is run once where it stands, and whose results have to be plain arrays."""
        outs, records = self.evaluate(jaxpr, inputs)
        return [self.decode(out, why) for out in outs], records

    def body(self, jaxpr: ClosedJaxpr, inputs: Sequence, why: str) -> tuple[list, Records]:
        """Walks the body of a loop or a branch, whose results have to be plain arrays."""
        inside = dataclasses.replace(self, place=self.place.inside(id(jaxpr)))
        return inside.part(jaxpr, inputs, why)
