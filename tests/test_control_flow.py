"""The walker: control flow keeps parameters in codes and its own meaning; data movement moves codes and scales as one.

Law of control flow: `quantized(fn, activations=None)(q, x) == fn(dequantize(q), x)`, and every matmul in the body is
integer arithmetic with int8 activations. Law of movement: a view of a bundle decodes to the view of what it decodes to,
exactly; so that with scales that are powers of two a moved weight gives the float matmul bit for bit.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import io_callback
from jax.extend.core import primitives
from jax.sharding import NamedSharding, PartitionSpec
from models import quickly_jitted

import jaxquant as jq
from jaxquant.errors import ClosureError
from jaxquant.matmul import rules
from jaxquant.trace import views
from jaxquant.trace.control import CONTROL
from jaxquant.trace.movement import _VIEWS

INTEGER = "int8 x int8 -> int32"
K, N = 16, 8


def normal(*shape, seed=0):
    """N(0, 1) in float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact(*shape, axis, seed=0):
    """Small integers times a power of two, the largest of them along an axis 127: they quantize without rounding."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, shape)
    np.moveaxis(codes, axis, 0)[::2] = 127
    return (
        codes * 2.0 ** rng.integers(-2, 3, [1 if a == axis % len(shape) else n for a, n in enumerate(shape)])
    ).astype(np.float32)


def arithmetic(fn, *args):
    """The set of what `explain` says of matmuls with a parameter."""
    return {row.arithmetic for row in jq.explain(fn, *args).meetings if row.path}


def equations(jaxpr):
    """All equations of a jaxpr, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def floats_of_size(fn, size, *args):
    """The equations of a traced function that make a float array of a size: a decoded weight is one."""
    made = [(eqn.primitive.name, var.aval) for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr) for var in eqn.outvars]
    return [name for name, aval in made if aval.size == size and jnp.issubdtype(aval.dtype, jnp.floating)]


# Movement

_MESH = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
_ON_MESH = NamedSharding(_MESH, PartitionSpec("d"))

# name: the shape of the weight, its contracted axis, and a matmul with a view of it.
MOVES = {
    "bf16": ((K, N), 0, lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)),
    "transposed": ((N, K), 1, lambda w, x: x @ w.T),
    "axes swapped": ((K, 2, 4), 0, lambda w, x: jnp.einsum("bk,hkd->bhd", x, jnp.swapaxes(w, 0, 1))),
    "outputs split": ((K, N), 0, lambda w, x: jnp.einsum("bk,khd->bhd", x, w.reshape(K, 2, 4))),
    "outputs merged": ((K, 2, 4), 0, lambda w, x: x @ w.reshape(K, N)),
    "inputs split": ((K, N), 0, lambda w, x: jnp.einsum("bij,ijn->bn", x.reshape(-1, 4, 4), w.reshape(4, 4, N))),
    "flat and back": ((K, N), 0, lambda w, x: x @ w.reshape(-1, K, N)[0]),
    "squeezed": ((1, K, N), 1, lambda w, x: x @ jnp.squeeze(w, 0)),
    "expanded": ((K, N), 0, lambda w, x: jnp.einsum("bk,ekn->ben", x, jnp.expand_dims(w, 0))),
    "broadcast": ((K, N), 0, lambda w, x: jnp.einsum("bk,bkn->bn", x, jnp.broadcast_to(w, (x.shape[0], K, N)))),
    "rows sliced": ((2 * K, N), 0, lambda w, x: x @ w[K:]),
    "columns sliced": ((K, N), 0, lambda w, x: x @ w[:, 2:6]),
    "strided": ((2 * K, N), 0, lambda w, x: x @ w[::2, ::3]),
    "dynamic columns": ((K, N), 0, lambda w, x: x @ jax.lax.dynamic_slice_in_dim(w, jnp.int32(3), 4, 1)),
    "dynamic rows": ((2 * K, N), 0, lambda w, x: x @ jax.lax.dynamic_slice_in_dim(w, jnp.int32(99), K, 0)),
    "dynamic layer": ((3, K, N), 1, lambda w, x: x @ jax.lax.dynamic_index_in_dim(w, jnp.int32(1), 0, False)),
    "layer": ((3, K, N), 1, lambda w, x: x @ w[2]),
    "split": ((K, 3 * N), 0, lambda w, x: [x @ part for part in jnp.split(w, 3, 1)]),
    "split layers": ((3, K, N), 1, lambda w, x: [x @ part[0] for part in jnp.split(w, 3, 0)]),
    "constrained": ((K, N), 0, lambda w, x: x @ jax.lax.with_sharding_constraint(w, _ON_MESH)),
    "constrained by jit": ((K, N), 0, lambda w, x: jax.jit(lambda w: w, in_shardings=_ON_MESH)(w).T @ x.T),
    "barrier": ((K, N), 0, lambda w, x: jnp.matmul(*jax.lax.optimization_barrier((x, w)))),
    "copied": ((K, N), 0, lambda w, x: x @ jnp.copy(w)),
    "all at once": ((3, N, 2, 8), (-2, -1), lambda w, x: x @ w[1].reshape(N, K).T[:, ::2]),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_moved_weight_stays_in_codes_and_is_exact(name):
    """Law: integer arithmetic on the view, bit for bit the float matmul where scales are powers of two."""
    shape, axis, fn = MOVES[name]
    x, w = exact(3, K, axis=1, seed=1), exact(*shape, axis=-1 if isinstance(axis, tuple) else axis)
    w = w if not isinstance(axis, tuple) else exact(3, N, K, axis=-1).reshape(shape)
    q = jq.quantize(w, axis=axis)
    assert np.array_equal(jq.dequantize(q), w)
    assert arithmetic(fn, q, x) == {INTEGER}
    for got, expected in zip(*map(jax.tree.leaves, (jq.quantized(fn)(q, x), fn(jnp.asarray(w), x))), strict=True):
        assert got.dtype == expected.dtype
        assert np.array_equal(got, expected)


DECODED = {
    "an operation without a rule": lambda w, x: x @ jnp.sin(w),
    "a product with a number": lambda w, x: x @ (w * 2),
    "a choice between it and a number": lambda w, x: x @ jnp.where(w > 0, w, 0.0),
    "two parameters at once": lambda w, x: x @ jnp.concatenate([w, w], 1),
    "reversed": lambda w, x: x @ w[::-1],
    "a parameter as the activations": lambda w, x: w.T @ w,
    "an integer cast": lambda w, x: x @ w.astype(jnp.int32).astype(jnp.float32),
    "a cut through a group": lambda w, x: x[:, :6] @ w[:6],
}


@pytest.mark.parametrize("fn", DECODED.values(), ids=DECODED)
def test_what_has_no_view_gets_the_decoded_array(fn):
    """Law 1 for every operation there is; `explain` says that it is float, and why."""
    x, q = normal(3, K), jq.quantize(normal(K, N, seed=1), jq.int8(group=4))
    assert np.allclose(jq.quantized(fn, activations=None)(q, x), fn(jq.dequantize(q), x), 1e-5, 1e-5)
    floats = [row for row in jq.explain(fn, q, x).meetings if row.arithmetic == "float"]
    assert floats and all(row.reason for row in floats)


# Views: every scale layout there is, against NumPy.


@st.composite
def bundles(draw, least=1):
    """`(codes, scale)`, numbers that are all different; every axis of the scale divides that of the codes."""
    sizes = st.sampled_from([1, 2, 3, 4, 6, 8])
    shape = tuple(draw(st.lists(sizes, min_size=least, max_size=4).filter(lambda s: np.prod(s) <= 400)))
    part = tuple(draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])) for n in shape)
    codes = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    return codes, 1 / (1 + np.arange(np.prod(part), dtype=np.float32)).reshape(part)


def spread(scale, shape):
    """The scale of every element."""
    for axis, n in enumerate(shape):
        scale = np.repeat(scale, n // scale.shape[axis], axis)
    return scale


def decodes_to(view, codes, scale, move):
    """A view is None, or it decodes to the moved array; it is not None where the scale is one or full."""
    if view is None:
        return scale.shape != codes.shape and scale.size > 1
    moved_codes, moved_scale = map(np.asarray, view)
    expected = move(codes * spread(scale, codes.shape))
    divides = all(n % s == 0 for n, s in zip(moved_codes.shape, moved_scale.shape, strict=True))
    return divides and np.array_equal(moved_codes * spread(moved_scale, moved_codes.shape), expected)


examples = settings(max_examples=50, deadline=None, derandomize=True)


@examples
@given(bundles(), st.data())
def test_transpose_of_a_bundle(bundle, data):
    """Law of views."""
    order = data.draw(st.permutations(range(bundle[0].ndim)))
    assert decodes_to(views.transpose(bundle, order), *bundle, lambda a: a.transpose(order))
    assert views.transpose(bundle, order) is not None


def factorizations(n, most=4):
    """The shapes of a size."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [s for rank in range(most + 1) for s in itertools.product(divisors, repeat=rank) if np.prod(s) == n]


@examples
@given(bundles(), st.data())
def test_reshape_of_a_bundle(bundle, data):
    """Law of views."""
    shape = bundle[0].shape
    new = data.draw(st.sampled_from(factorizations(bundle[0].size)))
    assert decodes_to(views.reshape(bundle, shape, new), *bundle, lambda a: a.reshape(new))


@examples
@given(bundles(), st.data())
def test_broadcast_of_a_bundle(bundle, data):
    """Law of views: new axes anywhere, and axes of one element that grow."""
    shape = bundle[0].shape
    rank = data.draw(st.integers(len(shape), 4))
    dimensions = tuple(sorted(data.draw(st.permutations(range(rank)))[: len(shape)]))
    new = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    for n, dimension in zip(shape, dimensions, strict=True):
        new[dimension] = n if n > 1 else new[dimension]
    placed = [1] * rank
    for n, dimension in zip(shape, dimensions, strict=True):
        placed[dimension] = n
    view = views.broadcast(bundle, shape, tuple(new), dimensions)
    assert decodes_to(view, *bundle, lambda a: np.broadcast_to(a.reshape(placed), new))
    assert view is not None


@examples
@given(bundles(), st.data())
def test_cut_of_a_bundle(bundle, data):
    """Law of views: empty cuts and strides too."""
    shape = bundle[0].shape
    start = tuple(data.draw(st.integers(0, n)) for n in shape)
    limit = tuple(data.draw(st.integers(a, n)) for a, n in zip(start, shape, strict=True))
    strides = tuple(data.draw(st.integers(1, 3)) for _ in shape)
    index = tuple(slice(*triple) for triple in zip(start, limit, strides, strict=True))
    view = views.cut(bundle, shape, start, limit, strides)
    if 0 in bundle[0][index].shape:
        assert view is None or view[0].shape == bundle[0][index].shape
    else:
        assert decodes_to(view, *bundle, lambda a: a[index])


@examples
@given(bundles(), st.data())
def test_dynamic_cut_of_a_bundle(bundle, data):
    """Law of views: a start out of range is clamped, as `jax.lax.dynamic_slice` does."""
    shape = bundle[0].shape
    sizes = tuple(data.draw(st.integers(1, n)) for n in shape)
    starts = tuple(data.draw(st.integers(-1, n + 1)) for n in shape)
    asked = [jnp.int32(s) for s in starts]
    expected = np.asarray(jax.lax.dynamic_slice(bundle[0] * spread(bundle[1], shape), asked, sizes))
    assert decodes_to(views.dynamic_cut(bundle, shape, asked, sizes), *bundle, lambda a: expected)


# Control flow

_SQUARE = (N, N)


def _scan_carrying(w, x):
    def body(carry, _):
        w, x = carry
        return (w, jnp.tanh(x @ w)), jnp.sum(x)

    return jax.lax.scan(body, (w, x), None, length=3)


def _while_testing(w, x):
    return jax.lax.while_loop(lambda x: jnp.sum(x @ w) < 1e3, lambda x: 2 * jnp.abs(x) @ jnp.abs(x).T @ x + 1, x)


def _while_carrying(w, x):
    def body(carry):
        i, w, x = carry
        return i + 1, w, jnp.tanh(x @ w)

    return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, w, x))[2]


@jax.custom_jvp
def _seven_forward(w, x):
    return x @ w


@_seven_forward.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 7 * (dx @ w) + x @ dw


@jax.custom_vjp
def _seven_backward(w, x):
    return x @ w


_seven_backward.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, g: (res[1].T @ g, 7 * (g @ res[0].T)))


def _closed_call(w, x):
    """No public function makes this equation, so one is put in the place of a `jit`."""
    staged = jax.make_jaxpr(jax.jit(lambda w, x: x @ w))(w, x)
    (call,) = staged.jaxpr.eqns
    call = call.replace(primitive=primitives.closed_call_p, params={"call_jaxpr": call.params["jaxpr"]})
    return jax.core.eval_jaxpr(staged.jaxpr.replace(eqns=[call]), (), w, x)[0]


FLOW = {
    "jit": jax.jit(lambda w, x: x @ w),
    "nested jit": jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, jax.jit(jnp.transpose)(w))),
    "scan of a constant": lambda w, x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0],
    "scan over layers": lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), jnp.sum(x)), x, w[None], reverse=True),
    "scan over inputs": lambda w, x: jax.lax.map(lambda row: row @ w, x),
    "scan that carries them": lambda w, x: _scan_carrying(w, x)[0][1],
    "fori": lambda w, x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x),
    "while that tests with them": _while_testing,
    "while that carries them": _while_carrying,
    "cond": lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w.T),
    "cond operands": lambda w, x: jax.lax.cond(x[0, 0] < 0, lambda w, x: x @ w, lambda w, x: x, w, x),
    "switch": lambda w, x: jax.lax.switch(jnp.int32(2), [lambda: x, lambda: x @ w, lambda: -x @ w]),
    "remat": jax.checkpoint(lambda w, x: jnp.sin(x @ w)),
    "remat with a policy": jax.checkpoint(
        lambda w, x: jnp.sin(x @ w), policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
    ),
    "custom_jvp": _seven_forward,
    "custom_vjp": _seven_backward,
    "custom derivative elsewhere": lambda w, x: jax.nn.relu(x @ w) + jax.nn.logsumexp(x @ w, -1, keepdims=True),
    "closed_call": _closed_call,
    "scan of remat of jit": lambda w, x: jax.lax.scan(
        jax.checkpoint(lambda x, _: (jax.jit(jnp.matmul)(x, w), None)), x, None, length=2
    )[0],
}
every_flow = pytest.mark.parametrize("name", FLOW)


@every_flow
def test_control_flow_keeps_its_meaning(name):
    """Law 1 through control flow, jitted, with its gradient in the other input where it has one."""
    x, q = normal(3, N), jq.quantize(normal(*_SQUARE, seed=1))
    fn, run = FLOW[name], jq.quantized(FLOW[name], activations=None)
    for got, expected in zip(*map(jax.tree.leaves, (quickly_jitted(run)(q, x), fn(jq.dequantize(q), x))), strict=True):
        assert np.allclose(got, expected, 1e-5, 1e-5)
    if "while" in name:
        return

    def gradient(fn, w):
        return quickly_jitted(jax.grad(lambda x: jnp.sum(jax.tree.leaves(fn(w, x))[0])))(x)

    assert np.allclose(gradient(run, q), gradient(fn, jq.dequantize(q)), 1e-4, 1e-4)


@pytest.mark.parametrize("name", [name for name in FLOW if "while" not in name])
def test_training_goes_through_control_flow(name):
    """Law: the gradient of `qat` by a weight is that of the function at its codes, a user's own derivative included."""
    x, w = normal(3, N), normal(*_SQUARE, seed=1)
    run = jq.qat(lambda params, x: FLOW[name](params["w"], x), activations=None)

    def gradient(fn, w):
        return quickly_jitted(jax.grad(lambda w: jnp.sum(jax.tree.leaves(fn(w, x))[0])))(w)

    got, expected = gradient(lambda w, x: run({"w": w}, x), w), gradient(FLOW[name], jq.dequantize(jq.quantize(w)))
    assert np.allclose(got, expected, 1e-4, 1e-4)


@every_flow
def test_control_flow_keeps_weights_in_codes(name):
    """Law: every matmul with the weight in a body is integer arithmetic, and nowhere is the weight decoded."""
    x, q = normal(3, N), jq.quantize(normal(*_SQUARE, seed=1))
    assert arithmetic(FLOW[name], q, x) == {INTEGER}
    assert jq.explain(FLOW[name], q, x).unmet == ()
    assert floats_of_size(jq.quantized(FLOW[name]), q.size, q, x) == []


@pytest.mark.parametrize("fn", [_seven_forward, _seven_backward], ids=["jvp", "vjp"])
@pytest.mark.parametrize("activations", [jq.int8, None], ids=["int8", "float"])
def test_a_users_derivative_is_kept(fn, activations):
    """Law: a custom derivative, here a wrong one, is what comes out, and not that of the matmul inside."""
    x, q = normal(3, N), jq.quantize(normal(*_SQUARE, seed=1))
    got = jax.grad(lambda x: jnp.sum(jq.quantized(fn, activations=activations)(q, x)))(x)
    assert np.allclose(got, 7 * np.ones_like(x) @ np.asarray(jq.dequantize(q)).T, 1e-5, 1e-5)


def test_a_scan_over_layers_of_every_layout():
    """Law: stacked scales, shared or full along the layers, are sliced with their codes."""
    x, w = normal(3, N), normal(4, *_SQUARE, seed=1)

    def fn(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x @ w), x, w)

    for q in (jq.quantize(w, axis=1), jq.quantize(w, jq.int8(per_channel=False)), jq.quantize(w, jq.int4(group=4))):
        run = jq.quantized(fn, activations=None)
        assert np.allclose(run(q, x)[1], fn(jq.dequantize(q), x)[1], 1e-5, 1e-5)
        assert arithmetic(fn, q, x) == {INTEGER}


def test_parameters_that_a_loop_carries_come_back_as_they_went_in():
    """Law: loops that carry parameters unchanged return the very QTensor, and one that changes them floats."""
    x, q = normal(3, N), jq.quantize(normal(*_SQUARE, seed=1))
    back = jq.quantized(_scan_carrying)(q, x)[0][0]
    assert isinstance(back, jq.QTensor) and back.codes is q.codes and back.scale is q.scale

    def growing(w, x):
        return jax.lax.fori_loop(0, 2, lambda _, carry: (2 * carry[0], carry[1] @ carry[0]), (w, x))

    got, expected = jq.quantized(growing, activations=None)(q, x), growing(jq.dequantize(q), x)
    assert all(np.allclose(*pair, 1e-5, 1e-5) for pair in zip(got, expected, strict=True))


def test_shard_map_decodes_outside_with_a_warning():
    """Law: equal to the decoded function, and the warning names the parameter."""
    x, params = normal(3, N), {"up": jq.quantize(normal(*_SQUARE, seed=1))}
    spec = PartitionSpec()
    inner = jax.shard_map(lambda w, x: x @ w, mesh=_MESH, in_specs=(spec, spec), out_specs=spec)
    with pytest.warns(UserWarning, match=r"shard_map.*up"):
        out = jq.quantized(lambda params, x: inner(params["up"], x))(params, x)
    assert np.allclose(out, inner(jq.dequantize(params["up"]), x), 1e-6, 1e-6)


def test_inside_a_shard_map_weights_stay_in_codes():
    """Law: `quantized` on the shards is `quantized`, bit for bit, and no weight is decoded."""
    x, q = normal(3, N), jq.quantize(normal(*_SQUARE, seed=1))
    run = jq.quantized(lambda w, x: jnp.tanh(x @ w))
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("d")), "out_specs": PartitionSpec("d")}
    inner = jax.shard_map(run, mesh=_MESH, check_vma=False, **specs)
    assert np.array_equal(jax.jit(inner)(q, x), jax.jit(run)(q, x))
    assert floats_of_size(inner, q.size, q, x) == []


# Effects, names, arguments


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_effects_happen_once_and_in_order(jit):
    """Law: callbacks before, between, inside and after matmuls run as often and in the order the function says."""
    heard, printed = [], []

    def tell(name, value):
        io_callback(lambda v: heard.append((name, v.shape)), None, value, ordered=True)

    def fn(w, x):
        tell("first", x)
        y = x @ w

        def body(y, _):
            tell("inside", y)
            jax.debug.callback(lambda v: printed.append(v.shape), y, ordered=True)
            return jnp.tanh(y @ w), None

        y, _ = jax.lax.scan(body, y, None, length=2)
        jax.debug.callback(lambda v: printed.append(v.shape), y[0], ordered=True)
        tell("last", y[:1])
        return y

    x, q = normal(3, N), jq.quantize(normal(*_SQUARE, seed=1))
    run = jq.quantized(fn)
    jax.block_until_ready((jax.jit(run) if jit else run)(q, x))
    jax.effects_barrier()
    assert heard == [("first", (3, N)), ("inside", (3, N)), ("inside", (3, N)), ("last", (1, N))]
    assert printed == [(3, N), (3, N), (N,)]


def test_name_scopes_are_kept():
    """Law: in the compiled program the matmul and what surrounds it are still under the function's name scopes."""

    def fn(w, x):
        with jax.named_scope("outer"):
            x = jnp.sin(x)
            with jax.named_scope("inner"):
                x = jax.lax.scan(lambda x, _: (jnp.cos(x @ w), None), x, None, length=2)[0]
            with jax.named_scope("head"):
                return jnp.exp(x @ w)

    x, q = normal(3, N), jq.quantize(normal(*_SQUARE, seed=1))
    text = jax.jit(jq.quantized(fn)).lower(q, x).compile().as_text()
    names = re.findall(r'op_name="jit\(fn\)/([^"]*)"', text)
    scopes = [[part for part in name.split("/") if part in ("outer", "inner", "head")] for name in names]
    found = {(name.split("/")[-1], *scope) for name, scope in zip(names, scopes, strict=True)}
    wanted = {("sin", "outer"), ("cos", "outer", "inner"), ("exp", "outer", "head")}
    wanted |= {("dot_general", "outer", "inner"), ("dot_general", "outer", "head")}
    assert {name for name in found if name[0] in ("sin", "cos", "exp", "dot_general")} == wanted


def test_arguments_that_are_not_arrays_are_static():
    """Law: strings, booleans, None, Python numbers and functions reach the function as they are."""
    seen = []

    def fn(w, x, mode, *, flag, nothing, times, act):
        seen.append((mode, flag, nothing, times))
        return act(x @ w) if mode == "go" and flag and nothing is None else None, range(times)

    x, q = normal(3, N), jq.quantize(normal(*_SQUARE, seed=1))
    out, rest = jq.quantized(fn, activations=None)(q, x, "go", flag=True, nothing=None, times=2, act=jnp.tanh)
    assert seen == [("go", True, None, 2)] and rest == range(2)
    assert np.allclose(out, np.tanh(x @ np.asarray(jq.dequantize(q))), 1e-5, 1e-5)


def test_parameters_in_any_argument():
    """Law: QTensors are found by position, by keyword and deep in trees, among NumPy arrays and scalars."""
    x, q = normal(3, N), jq.quantize(normal(*_SQUARE, seed=1))
    w = np.asarray(jq.dequantize(q))
    run = jq.quantized(lambda x, tree, *, last: (x @ tree["a"][0]) @ last * tree["b"], activations=None)
    out = run(x, {"a": [q], "b": np.float32(2)}, last=q)
    assert np.allclose(out, 2 * (x @ w) @ w, 1e-4, 1e-4)


def test_results_that_are_not_arrays():
    """Law: the tree of results is the function's own: None, strings, numbers and nested containers included."""
    x, q = normal(3, N), jq.quantize(normal(*_SQUARE, seed=1))
    out = jq.quantized(lambda w, x: {"y": [x @ w, None], "name": "text", "shape": w.shape, "fn": jnp.tanh})(q, x)
    assert out["name"] == "text" and tuple(map(int, out["shape"])) == _SQUARE and out["fn"] is jnp.tanh
    assert out["y"][0].shape == x.shape and out["y"][1] is None


def test_a_qtensor_returned_unchanged_is_itself_and_one_derived_from_it_is_a_float_array():
    """Law: state round-trips without being decoded or copied."""
    q = jq.quantize(normal(*_SQUARE))
    same, again, derived = jq.quantized(lambda w: (w, {"w": w}, w.T))(q)
    assert same is q and again["w"] is q
    assert np.array_equal(derived, jq.dequantize(q).T)


CLOSURES = {
    "matmul": lambda q: lambda x: jnp.matmul(x, q),
    "operator": lambda q: lambda x: x @ q,
    "operator on the left": lambda q: lambda x: q @ x.T,
    "sum": lambda q: lambda x: jnp.sum(q) + x,
    "einsum": lambda q: lambda x: jnp.einsum("bk,kn->bn", x, q),
}


@pytest.mark.parametrize("closes", CLOSURES.values(), ids=CLOSURES)
def test_a_qtensor_in_a_closure_is_an_error_that_says_what_to_do(closes):
    """Law: never a silent float path: the error says to pass it as an argument."""
    with pytest.raises(ClosureError, match=r"argument of jq\.quantized"):
        jq.quantized(closes(jq.quantize(normal(*_SQUARE))))(jnp.asarray(normal(3, N)))


# Kept for other versions of JAX, whose jaxprs name these primitives; no jaxpr of this version does.
ALIASES = {"pjit", "remat", "checkpoint", "custom_vjp_call_jaxpr", "core_call", "expand_dims"}


def test_every_name_in_the_rule_tables_occurs_in_a_jaxpr():
    """Law: a rule under a name that no jaxpr has is a weight silently decoded; all but the listed aliases occur."""
    w, x, stack = normal(*_SQUARE), normal(3, N), normal(1, N, N)
    programs = [(fn, w, x) for fn in FLOW.values()]
    programs += [(fn, normal(*shape), normal(3, K)) for shape, _, fn in MOVES.values()]
    programs += [
        (lambda w, x: jax.lax.conv(x[None], w[:, :, None], (1,), "SAME"), w, x.T),
        (lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([3], jnp.int32)), stack, x),
        (lambda w, x: w[jnp.array([1, 2])], w, x),
        (
            lambda w, x: jax.shard_map(jnp.matmul, mesh=_MESH, in_specs=PartitionSpec(), out_specs=PartitionSpec())(
                x, w
            ),
            w,
            x,
        ),
    ]
    produced = {eqn.primitive.name for fn, *args in programs for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr)}
    known = {*CONTROL, *_VIEWS, *rules(jq.int8, 0).operations}
    assert known - produced == ALIASES
