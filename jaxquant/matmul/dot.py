"""`dot_general` with a weight in codes on either side: any dimension numbers, brought to `[B, M, K] @ [B, K, N]`."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant import inputs
from jaxquant.format import Format
from jaxquant.matmul.arithmetic import split_kept
from jaxquant.matmul.batches import of_batches
from jaxquant.matmul.choice import FLOAT, Formulation, choose
from jaxquant.matmul.precision import float_dot, may_round, within
from jaxquant.qtensor import QTensor, decode
from jaxquant.trace import views
from jaxquant.trace.views import Bundle

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Dot:
    """One `dot_general` with a weight in codes, as hashable data.

    Args:
      contracted, batch: the axes of the activations and of the weight, `((x axes), (w axes))`.
      weight_first: whether the weight is the left operand.
      activations, outliers: the format of the activations or None, and how many of each token's stay in float.
      precision, dtype: as `jax.lax.dot_general` takes the precision and the result's dtype.
      memory: the permutation that brings the weight's axes to the order they lie in memory.
    """

    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    weight_first: bool
    activations: Format | None
    outliers: int
    precision: Any
    dtype: Any
    memory: tuple[int, ...]

    def arithmetic(self, x_shape: tuple[int, ...], q: QTensor) -> tuple[str, str]:
        """How this will be computed, and why not in integers."""
        weight = jax.eval_shape(self.matrices, q)
        if weight is None:
            why = "its scales do not follow the axes of this matmul: let `stats` tell them"
            return FLOAT, why if q.size else "it has no elements"
        formulation = self._choose(x_shape, weight)
        return formulation.arithmetic, formulation.reason

    def forward(self, x: Float[Array, "..."], q: QTensor) -> Float[Array, "..."]:
        """The product in the best arithmetic for the weight's format."""
        outputs = _rest(q.ndim, self.contracted[1], self.batch[1])
        place = len(self.batch[0]) + (len(outputs) if self.weight_first else 0)
        return of_batches(self._forward, self._of_rows().forward, self._of_stack().forward, place)(x, q)

    def _of_rows(self) -> "Dot":
        """The same product of activations that have one more axis, which comes first."""
        contracted, batch = ((_moved(x), w) for x, w in (self.contracted, self.batch))
        return dataclasses.replace(self, contracted=contracted, batch=batch)

    def _of_stack(self) -> "Dot":
        """The same of activations and weights that both have one more, which goes along with that of the other."""
        contracted, batch = ((_moved(x), _moved(w)) for x, w in (self.contracted, self.batch))
        batch, memory = ((0, *batch[0]), (0, *batch[1])), (0, *_moved(self.memory))
        return dataclasses.replace(self, contracted=contracted, batch=batch, memory=memory)

    def _forward(self, x: Float[Array, "..."], q: QTensor) -> Float[Array, "..."]:
        with within(self.precision):
            return self._chosen(x, q)

    def _chosen(self, x: Float[Array, "..."], q: QTensor) -> Float[Array, "..."]:
        weight = self.matrices(q)
        if weight is None:
            return self.reference(x, q)
        formulation = self._choose(x.shape, weight)
        forms = {"cuda": formulation.gpu, "cpu": formulation.cpu}
        multiply = {
            platform: functools.partial(self._multiply, Formulation("", run=form))
            for platform, form in forms.items()
            if form is not None
        }
        anywhere = functools.partial(self._multiply, formulation)
        return jax.lax.platform_dependent(x, q, **multiply, default=anywhere) if multiply else anywhere(x, q)

    def _multiply(self, formulation: Formulation, x: Array, q: QTensor) -> Array:
        weight = self.matrices(q)
        assert weight is not None
        if formulation.run is None and formulation.say is None:
            return self.reference(x, q)
        plain = not weight.transform and weight.kept is None
        tokens, beside = (self.tokens(x), None) if plain else self._transformed(x, weight)
        if formulation.run is not None:
            out = self.assembled(formulation.run(tokens, self._rounded(weight.core)), x.shape, q.shape)
        else:
            assert formulation.say is not None
            # In float32 whatever the dtype, so that the codes of the activations are exact here too.
            said = self._untokened(formulation.say(tokens, weight), x.shape)
            exact = dataclasses.replace(self, dtype=jnp.dtype(jnp.float32))
            out = exact.reference(said, q.core.astype(jnp.float32))
        return (out if beside is None else out + self.assembled(beside, x.shape, q.shape)).astype(self.dtype)

    def reference(self, x: Float[Array, "..."], q: QTensor) -> Float[Array, "..."]:
        """The product with the decoded weight, which is decoded in the order it lies in memory."""
        contracted, batch = self.contracted, self.batch
        weight = decode(views.transpose(q, self.memory))
        operands = (x, jnp.transpose(weight, [self.memory.index(axis) for axis in range(q.ndim)]))
        if self.weight_first:
            contracted, batch, operands = _swap(contracted), _swap(batch), _swap(operands)
        return float_dot(*operands, (contracted, batch), self.precision, self.dtype)

    def transformed(self, x: Float[Array, "..."], q: QTensor) -> Float[Array, "..."]:
        """What the codes meet: the activations after the transform, without the inputs that are kept in float."""
        weight = self.matrices(q)
        if weight is None:
            return x
        return self._untokened(self._transformed(x, weight)[0], x.shape)

    def _transformed(self, x: Float[Array, "..."], weight: QTensor) -> tuple[Array, Float[Array, "B M N"] | None]:
        """The tokens after the transform in float32, without the inputs that are kept, and the product of those."""
        return split_kept(inputs.apply(weight.transform, self.tokens(x)), weight.kept)

    def _choose(self, x_shape: tuple[int, ...], weight: QTensor) -> Formulation:
        rows = _sizes(x_shape, _rest(len(x_shape), self.contracted[0], self.batch[0]))
        inputs_last = bool(self.memory) and self.memory[-1] in self.contracted[1]
        formats = self.activations, self.outliers
        return choose(rows, self._rounded(weight), inputs_last, *formats, self.precision)

    def _rounded(self, weight: QTensor) -> QTensor:
        """The weight as one of a bfloat16 model, where that is allowed."""
        return weight.astype(jnp.bfloat16) if may_round(self.precision) else weight

    def tokens(self, x: Array) -> Float[Array, "B M K"]:
        """The activations as rows of a batch of matrices."""
        contracted, batch = self.contracted[0], self.batch[0]
        rest = _rest(x.ndim, contracted, batch)
        moved = jnp.transpose(x, (*batch, *rest, *contracted))
        return moved.reshape(_sizes(x.shape, batch), _sizes(x.shape, rest), _sizes(x.shape, contracted))

    def _untokened(self, rows: Float[Array, "B M K"], x_shape: tuple[int, ...]) -> Array:
        """The inverse of `tokens`."""
        contracted, batch = self.contracted[0], self.batch[0]
        order = (*batch, *_rest(len(x_shape), contracted, batch), *contracted)
        moved = rows.reshape([x_shape[axis] for axis in order])
        return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])

    def matrices(self, q: QTensor) -> QTensor | None:
        """The weight as a batch of matrices `[B, K, N]`; None where its scales cannot follow, or there are none."""
        if not q.size:
            return None
        contracted, batch = self.contracted[1], self.batch[1]
        order = (*batch, *contracted, *_rest(q.ndim, contracted, batch))
        sizes = [_sizes(q.shape, axes) for axes in (batch, contracted, _rest(q.ndim, contracted, batch))]
        moved = views.transpose(q, order)
        matrices = views.reshape(moved, moved.shape, tuple(sizes))
        return None if matrices is None or not _takes_inputs(matrices) else _spread(matrices)

    def assembled(self, out: Float[Array, "B M N"], x_shape, w_shape) -> Array:
        """The result in the axes of `dot_general`: batch, those of the left operand, those of the right one."""
        batch = [x_shape[a] for a in self.batch[0]]
        of_x = [x_shape[a] for a in _rest(len(x_shape), self.contracted[0], self.batch[0])]
        of_w = [w_shape[a] for a in _rest(len(w_shape), self.contracted[1], self.batch[1])]
        if self.weight_first:
            return jnp.swapaxes(out, 1, 2).reshape(*batch, *of_w, *of_x)
        return out.reshape(*batch, *of_x, *of_w)


def _moved(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis + 1 for axis in axes)


def _swap(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return pair[1], pair[0]


def _rest(rank: int, *taken: Sequence[int]) -> tuple[int, ...]:
    return tuple(a for a in range(rank) if all(a not in axes for axes in taken))


def _sizes(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[a] for a in axes)


def _takes_inputs(q: QTensor) -> bool:
    """Whether what is done to the inputs of `[B, K, N]` is done along K, and not along what are outputs here."""
    parts = jax.tree.leaves(q.transform) + ([] if q.kept is None else [q.kept.mask])
    return all(part.shape[2] == 1 for part in parts) and q.blocks[0] == 1


def _spread(q: QTensor) -> QTensor:
    """Gives what counts groups along the batch or the outputs the full size there."""

    def one(part):
        batch, groups, outputs = part.shape
        full = (batch if batch == 1 else q.shape[0], groups, outputs if outputs == 1 else q.shape[2])
        return views.expand(part, full)

    names = ("scale", "zero", "transform", "kept", "input_bound")
    return dataclasses.replace(q, **{name: jax.tree.map(one, getattr(q, name)) for name in names})


def make_dot(
    numbers: DimensionNumbers,
    weight_first: bool,
    activations: tuple[Format | None, int],
    precision: Any,
    dtype: Any,
    memory: tuple[int, ...],
) -> Dot:
    """A `Dot` from the dimension numbers of `jax.lax.dot_general` and `(activations, outliers)`."""
    contracted, batch = ((tuple(map(int, pair[0])), tuple(map(int, pair[1]))) for pair in numbers)
    if weight_first:
        contracted, batch = _swap(contracted), _swap(batch)
    # The order of a sum does not matter, and groups and blocks only stay together in that of the weight.
    pairs = sorted(zip(*contracted, strict=True), key=lambda pair: pair[1])
    contracted = (tuple(x for x, _ in pairs), tuple(w for _, w in pairs))
    return Dot(contracted, batch, weight_first, *activations, precision, jnp.dtype(dtype), memory)


def as_it_lies(
    weight: Bundle, memory: tuple[int, ...], numbers: DimensionNumbers, first: bool
) -> tuple[Bundle, DimensionNumbers, tuple[int, ...]]:
    """A weight with its axes in the order of memory, and what that makes of the dimension numbers and of that order.

    Outside of the operation, where XLA sees that it transposes back what was transposed: inside it would not, and would
    convert a transposed weight before it is multiplied. Outputs that would change places are left as they are.

    Args:
      weight: the weight.
      memory: the permutation that brings its axes to the order they lie in memory.
      numbers: the dimension numbers of `jax.lax.dot_general`.
      first: whether the weight is the left operand.
    """
    natural = tuple(range(weight.ndim))
    side = 0 if first else 1
    taken = {*numbers[0][side], *numbers[1][side]}
    outputs = [axis for axis in memory if axis not in taken]
    if memory == natural or outputs != sorted(outputs):
        return weight, numbers, memory
    moved = [[list(pair[0]), list(pair[1])] for pair in numbers]
    for pair in moved:
        pair[side] = [memory.index(axis) for axis in pair[side]]
    contracted, batch = ((tuple(left), tuple(right)) for left, right in moved)
    return views.transpose(weight, memory), (contracted, batch), natural
