"""Laws of `calibrate`: statistics are those of the very tokens that a weight is multiplied with, whatever is around it.

Tokens    count, absmax, abssum, gram and above are those of the tokens, in the axes of the parameter
Fold      calibrate(a + b) == merge(calibrate(a), calibrate(b)), in any order, of any shapes
Use       no weight of the zoo is worse calibrated than rounded to nearest
Errors    name the batch, or the parameter

The functions are made exact: activations are whole numbers up to 3 and weights 1, 0 or -1, so every sum is a whole
number that float32 holds, equality is demanded, and the oracle is a matrix of tokens written down in NumPy.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from models import FEW, MODELS

import jaxquant as jq
from jaxquant import errors
from jaxquant.matrices import Matrices
from jaxquant.packed import Packed
from jaxquant.params import axes_of, is_matrix
from jaxquant.stats import THRESHOLDS
from jaxquant.trace import path_name

T, K, LAYERS = 5, 8, 4
FORMAT = jq.int4(group=8)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """It is not the compiled program that matters here, and compiling takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def whole(*shape, most=3, seed=0):
    """Whole numbers in [-most, most]."""
    return np.random.default_rng(seed).integers(-most, most + 1, shape).astype(np.float32)


def act(y):
    """A nonlinearity that keeps whole numbers whole, and small."""
    return y.clip(-3, 3)


X, STACK = whole(T, K), whole(LAYERS, K, K, most=1, seed=2)
W, NESTED = STACK[0], STACK.reshape(2, 2, K, K)
# What each layer of a chain sees, and at last what comes out.
CHAINED = [X]
for _w in STACK:
    CHAINED.append(act(CHAINED[-1] @ _w))


def oracle(tokens):
    """The statistics of tokens `[T, in]`, or of a (nested) list of them for each matrix of a stack, in float64."""
    if isinstance(tokens, list):
        return jax.tree.map(lambda *parts: np.stack(parts), *map(oracle, tokens))
    x = np.asarray(tokens, np.float64)
    size = np.abs(x)
    above = np.array([np.sum(size > threshold) for threshold in THRESHOLDS])
    return {"count": len(x), "absmax": size.max(0, initial=0), "abssum": size.sum(0), "above": above, "gram": x.T @ x}


def check(stats, expected):
    """Statistics by path are exactly those of `(stack, inputs, tokens)` by path, in whatever order the stack comes."""
    assert set(stats) == set(expected)
    for path, (stack, inputs, tokens) in expected.items():
        found, order = stats[path], np.argsort(stats[path].stack)
        assert (tuple(sorted(found.stack)), found.inputs) == (stack, inputs), path
        for name, wanted in oracle(tokens).items():
            got = np.moveaxis(getattr(found, name), order, range(len(order)))
            np.testing.assert_array_equal(got, wanted, f"{name} of {path}")


# One matrix met by X, seen in many ways. Name: the parameter, its contracted axes, and a function of it and of X.

_HEADS, _OUT = W.reshape(K, 2, 4), W.reshape(4, 2, K)  # query [d, h, k], out [h, k, d]
_FORWARD = jax.custom_jvp(lambda w, x: x @ w)
_FORWARD.defjvp(lambda primals, tangents: (_FORWARD(*primals), tangents[1]))
_BACKWARD = jax.custom_vjp(lambda w, x: act(x @ w))
_BACKWARD.defvjp(lambda w, x: (_BACKWARD(w, x), (w, x)), lambda kept, g: kept)

ONE = {
    "plain": (W, (0,), lambda w, x: x @ w),
    "transposed": (W.T, (1,), lambda w, x: x @ w.T),
    "on the left": (W.T, (1,), lambda w, x: jax.vmap(lambda x: w @ x)(x)),
    "query": (_HEADS, (0,), lambda w, x: jnp.einsum("td,dhk->thk", x, w)),
    "out": (_OUT, (0, 1), lambda w, x: jnp.einsum("thk,hkd->td", x.reshape(T, 4, 2), w)),
    "out, heads last": (
        _OUT,
        (0, 1),
        lambda w, x: jnp.einsum("tkh,hkd->td", jnp.swapaxes(x.reshape(T, 4, 2), 1, 2), w),
    ),
    "inputs split": (W, (0,), lambda w, x: jnp.einsum("thk,hkd->td", x.reshape(T, 2, 4), w.reshape(2, 4, K))),
    "outputs split": (W, (0,), lambda w, x: jnp.einsum("td,dhk->htk", x, w.reshape(K, 2, 4))),
    "fused, sliced": (W, (0,), lambda w, x: (x @ w[:, :3], x @ w[:, 3:])),
    "fused, split": (W, (0,), lambda w, x: [x @ part for part in jnp.split(w, [2, 4], 1)]),
    "strided": (W, (0,), lambda w, x: x @ w[:, ::2]),
    "vector": (W[0], (0,), lambda w, x: x @ w),
    "to bf16": (W, (0,), lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)),
    "from bf16": (W.astype(jnp.bfloat16), (0,), lambda w, x: x @ w.astype(jnp.float32)),
    "jit": (W, (0,), lambda w, x: jax.jit(jnp.matmul)(x, w)),
    "remat": (W, (0,), jax.checkpoint(lambda w, x: act(x @ w))),
    "vmap": (W, (0,), lambda w, x: jax.vmap(lambda x: x @ w)(x)),
    "broadcast": (W, (0,), lambda w, x: jnp.einsum("tk,tkn->tn", x, jnp.broadcast_to(w, (T, K, K)))),
    "custom_jvp": (W, (0,), _FORWARD),
    "custom_vjp": (W, (0,), _BACKWARD),
    "squeezed": (W[None], (1,), lambda w, x: x @ w.reshape(K, K)),
    "ensemble": (np.stack([W, W], 1), (0,), lambda w, x: jax.vmap(jnp.matmul, (None, 1))(x, w)),
}


@pytest.mark.parametrize("name", ONE)
def test_one_matrix(name):
    """Law of tokens: the view of a parameter changes neither its tokens nor the axes of it that they meet."""
    w, inputs, fn = ONE[name]
    check(jq.calibrate(lambda p, x: fn(p["w"], x), {"w": w}, [X], where=lambda *_: True), {"w": ((), inputs, X)})


# A chain of layers in one stacked parameter. Name: the parameter, its axes of the stack and of inputs, and a function.


def layer(x, w):
    """One layer."""
    return act(x @ w)


def scan(w, x, layer=layer, **options):
    """All layers of a stack."""
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, w, **options)[0]


def turns(n, x, body):
    """`n` turns of a loop that does not know their number before it runs."""
    return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, body(c[0], c[1])), (jnp.int32(0), x))[1]


def switch(w, x, i):
    """One layer of a stack by a branch for each."""
    return jax.lax.switch(i, [functools.partial(layer, w=w[j]) for j in range(LAYERS)], x)


_3D, _4D = (STACK, (0,), (1,)), (NESTED, (0, 1), (2,))
_NEVER = lambda x, w: jax.lax.cond(x[0, 0] > 9, lambda x: x, lambda x: layer(x, w), x)  # noqa: E731

CHAIN = {
    "scan": (*_3D, scan),
    "unrolled": (*_3D, functools.partial(scan, unroll=2)),
    "rematerialised": (*_3D, functools.partial(scan, layer=jax.checkpoint(layer))),
    "cond in scan": (*_3D, functools.partial(scan, layer=_NEVER)),
    "middle axis": (STACK.swapaxes(0, 1), (1,), (0,), lambda w, x: scan(jnp.swapaxes(w, 0, 1), x)),
    "[out, in]": (STACK.swapaxes(1, 2), (0,), (2,), lambda w, x: scan(jnp.swapaxes(w, 1, 2), x)),
    "scan over indices": (*_3D, lambda w, x: scan(jnp.arange(LAYERS), x, lambda x, i: layer(x, w[i]))),
    "fori_loop": (*_3D, lambda w, x: jax.lax.fori_loop(0, LAYERS, lambda i, x: layer(x, w[i]), x)),
    "while_loop": (*_3D, lambda w, x: turns(LAYERS, x, lambda i, x: layer(x, w[i]))),
    "static indices": (*_3D, lambda w, x: functools.reduce(lambda x, i: layer(x, w[i]), range(LAYERS), x)),
    "split": (*_3D, lambda w, x: functools.reduce(lambda x, w: layer(x, w[0]), jnp.split(w, LAYERS), x)),
    "switch in while_loop": (*_3D, lambda w, x: turns(LAYERS, x, lambda i, x: switch(w, x, i))),
    "scan in scan": (*_4D, lambda w, x: scan(w, x, lambda x, w: scan(w, x))),
    "scan in fori_loop": (*_4D, lambda w, x: jax.lax.fori_loop(0, 2, lambda i, x: scan(w[i], x), x)),
    "scan in while_loop": (*_4D, lambda w, x: turns(2, x, lambda i, x: scan(w[i], x))),
    "while_loop in scan": (*_4D, lambda w, x: scan(w, x, lambda x, w: turns(2, x, lambda i, x: layer(x, w[i])))),
    "scans of slices": (*_4D, lambda w, x: scan(w[1], scan(w[0], x))),
    "two indices": (*_4D, lambda w, x: functools.reduce(lambda x, i: layer(x, w[i]), np.ndindex(2, 2), x)),
}


@pytest.mark.parametrize("name", CHAIN)
def test_a_chain_of_layers(name):
    """Law of tokens: loops, indices and slices of a stack are the unrolled layers, each with the tokens it saw."""
    w, stack, inputs, fn = CHAIN[name]
    tokens = [CHAINED[:2], CHAINED[2:4]] if len(stack) == 2 else CHAINED[:4]
    check(jq.calibrate(lambda p, x: fn(p["w"], x), {"w": w}, [X]), {"w": (stack, inputs, tokens)})


# Several weights, or several meetings. Name: a function, its parameters, other arguments, what is expected.

U, V = STACK[:2]
UV, H = {"u": U, "v": V}, act(X @ U)
TWO, LOOPED = np.stack([X, X]), np.concatenate([0 * X, act(X @ U)])
PICKS, PAIRS = np.array([2, 0, 1, 2, 2]), np.array([[0, 1], [1, 2], [2, 2], [0, 0], [1, 1]])
BY_PAIR = np.stack([X, H], 1)


def invariant(n):
    """A loop whose inputs do not change, and after it another weight that meets the same ones."""
    fn = lambda p, n, x: (turns(n, x, lambda i, y: y + x @ p["u"]), x @ p["v"])  # noqa: E731
    return fn, UV, (n, X), {"u": ((), (0,), np.tile(X, (n, 1))), "v": ((), (0,), X)}


def until(p, x):
    """A loop whose test multiplies, too: once more than there are turns."""
    test = lambda c: c[0] + 0 * jnp.sum(c[1] @ p["u"]) < 1  # noqa: E731
    return jax.lax.while_loop(test, lambda c: (c[0] + 1, act(c[1] @ p["v"])), (0.0, x))


def recurrent(p, xs):
    """Weights that are constants of a loop over time, as an LSTM's."""
    return scan(xs, jnp.zeros((T, K)), lambda h, x: act(x @ p["u"] + h @ p["v"]))


def picked(spec, picks, x, tokens):
    """Experts picked by a gather, and the tokens of each pick."""
    fn = lambda p, picks, x: jnp.einsum(spec, x, p["w"][picks])  # noqa: E731
    return fn, {"w": STACK}, (picks, x), {"w": ((0,), (1,), [tokens[picks == i] for i in range(LAYERS)])}


def ragged(p, sizes, others, x):
    """The same tokens dealt out in two ways, to different numbers of experts; some are dealt to none."""
    return jax.lax.ragged_dot(x, p["u"], sizes), jax.lax.ragged_dot(x, p["v"], others)


def dense(p, x):
    """Every token through every expert."""
    return jnp.einsum("tef,efd->ted", act(jnp.einsum("td,edf->tef", x, p["u"])), p["v"])


def of(tokens, stack=(), inputs=(0,)):
    """What is expected of one weight."""
    return stack, inputs, tokens


_BRANCHES = lambda p, b, x: jax.lax.cond(b, lambda x: x @ p["u"], lambda x: x @ p["v"], x)  # noqa: E731
_KEY = lambda p, key, x: (x + 0 * jax.random.normal(key)) @ p["w"]  # noqa: E731
_DEALT = {"u": of([X[:1], X[1:4]], (0,), (1,)), "v": of([X[:2], X[:0], X[2:]], (0,), (1,))}

SEVERAL = {
    "mlp": (lambda p, x: act(x @ p["u"]) @ p["v"], UV, (X,), {"u": of(X), "v": of(H)}),
    "met twice": (lambda p, x: act(x @ p["w"]) @ p["w"], {"w": U}, (X,), {"w": of(np.concatenate([X, H]))}),
    "met with and without another": (
        *(lambda p, x: (x @ p["u"], x @ p["v"], act(2 * x) @ p["u"]), UV, (X,)),
        {"u": of(np.concatenate([X, act(2 * X)])), "v": of(X)},
    ),
    "cond": (_BRANCHES, UV, (True, X), {"u": of(X), "v": of(X[:0])}),
    "three turns": invariant(3),
    "no turn": invariant(0),
    "the test of a loop": (until, UV, (X,), {"u": of(np.concatenate([X, act(X @ V)])), "v": of(X)}),
    "recurrent": (recurrent, UV, (TWO,), {"u": of(np.tile(X, (2, 1))), "v": of(LOOPED)}),
    "tied": (lambda p, i: p["e"][i] @ p["e"].T, {"e": W}, (PICKS,), {"e": of(W[PICKS], inputs=(1,))}),
    "only looked up": (lambda p, i: p["e"][i], {"e": W}, (PICKS,), {}),
    "an expert for each token": picked("tk,tkn->tn", PICKS, X, X),
    "two experts": picked("tsk,tskn->tsn", PAIRS, BY_PAIR, BY_PAIR),
    "two experts, swapped": picked("stk,tskn->stn", PAIRS, BY_PAIR.swapaxes(0, 1), BY_PAIR),
    "ragged_dot": (ragged, {"u": STACK[:2], "v": STACK[:3]}, (np.array([1, 3]), np.array([2, 0, 3]), X), _DEALT),
    "dense experts": (
        *(dense, {"u": STACK, "v": STACK}, (X,)),
        {"u": of(X, inputs=(1,)), "v": of([act(X @ w) for w in STACK], (0,), (1,))},
    ),
    "a key among arguments": (_KEY, {"w": W}, (jax.random.key(0), X), {"w": of(X)}),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_weights(name):
    """Law of tokens: every multiplication that is done counts, and no other."""
    fn, params, args, expected = SEVERAL[name]
    check(jq.calibrate(fn, params, [tuple(map(jnp.asarray, args))]), expected)


_STEPS, _GAPS, _GROUPS = {"window_strides": (2, 1)}, {"rhs_dilation": (1, 2)}, {"feature_group_count": 2}
_MARGINS = {"padding": ((1, 1), (0, 2))}
CONVOLUTIONS = {
    "plain": {},
    "strided": _STEPS,
    "dilated": _GAPS,
    "padded": _MARGINS,
    "grouped": _GROUPS,
    "all at once": _STEPS | _GAPS | _MARGINS | _GROUPS,
}


def patches(x, window_strides=(1, 1), rhs_dilation=(1, 1), padding=((0, 0), (0, 0)), feature_group_count=1):
    """What a window of 3 by 2 over `x[n, h, w, c]` sees: `[places * groups, 3, 2, c / groups]`."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    (dh, dw), (rows, columns) = rhs_dilation, x.shape[1:3]
    corners = np.ndindex((rows - 2 * dh - 1) // window_strides[0] + 1, (columns - dw - 1) // window_strides[1] + 1)
    starts = [(i * window_strides[0], j * window_strides[1]) for i, j in corners]
    seen = [x[:, i : i + 2 * dh + 1 : dh, j : j + dw + 1 : dw] for i, j in starts]
    return np.concatenate([part for patch in seen for part in np.split(patch, feature_group_count, -1)])


@pytest.mark.parametrize("order", ["HWIO", "OIHW"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution(name, order):
    """Law of tokens: a convolution multiplies a matrix with patches, one for each place and group of features."""
    options, x = CONVOLUTIONS[name], whole(2, 5, 6, 4)
    tokens, inputs = patches(x, **options), (0, 1, 2)
    kernel = whole(3, 2, tokens.shape[-1], 8, most=1)
    if order == "OIHW":
        kernel, tokens, inputs = kernel.transpose(3, 2, 0, 1), np.moveaxis(tokens, -1, 1), (1, 2, 3)

    def fn(params, x):
        given = {"window_strides": (1, 1), "padding": "VALID"} | options
        return jax.lax.conv_general_dilated(x, params["w"], dimension_numbers=("NHWC", order, "NHWC"), **given)

    check(jq.calibrate(fn, {"w": kernel}, [x]), {"w": of(tokens.reshape(len(tokens), -1), inputs=inputs)})


def test_weights_fed_by_one_array_share_their_statistics():
    """Law: q, k and v have one Gram matrix between them, the very same array."""

    def fn(p, x):
        return x @ p["q"], jax.jit(jnp.matmul)(x, p["k"]), jnp.einsum("tk,khd->thd", x, p["v"]), act(x) @ p["o"]

    stats = jq.calibrate(fn, {"q": W, "k": W + 1, "v": _HEADS, "o": W}, [X])
    assert stats["q"].gram is stats["k"].gram is stats["v"].gram is not stats["o"].gram
    attention = "params/MultiHeadDotProductAttention_0/{}/kernel"
    q, k, v, o = (
        stats_of("linen_transformer")[attention.format(part)].gram for part in ("query", "key", "value", "out")
    )
    assert q is k is v is not o


# Folds


def mlp(params, x):
    """Two matmuls that keep whole numbers whole."""
    return act(x @ params["u"]) @ params["v"]


def same(a, b):
    """Two trees are equal bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_calibration_is_a_fold():
    """Law: over [a, b, c] it is the merge of those over a, b and c, in any order and of any shape."""
    batches = [X, whole(3, K, seed=3), whole(2, 4, K, seed=4), X]
    alone = [jq.calibrate(mlp, UV, [batch]) for batch in batches[:3]]
    expected = functools.reduce(lambda a, b: {path: a[path].merge(b[path]) for path in a}, [*alone, alone[0]])
    assert same(jq.calibrate(mlp, UV, batches), expected)
    assert same(jq.calibrate(mlp, UV, iter(batches[::-1])), expected)


def test_batches_may_take_different_ways():
    """Law of folds, where a static part of a batch says which weights are used."""
    stats = jq.calibrate(lambda p, which, x: x @ p[which], UV, [("u", X), ("v", X[:2]), ("v", X), ("u", X[1:])])
    check(stats, {"u": of(np.concatenate([X, X[1:]])), "v": of(np.concatenate([X, X[:2]]))})


def test_what_a_batch_is():
    """Law: a tuple is several arguments, anything else is one."""
    expected = jq.calibrate(mlp, UV, [X])
    assert same(jq.calibrate(lambda p, a, b: mlp(p, a + b), UV, [(X, 0 * X)]), expected)
    assert same(jq.calibrate(lambda p, d: mlp(p, d["x"][0]), UV, [{"x": [X]}]), expected)


def test_shapes_give_zeros():
    """Law: a `ShapeDtypeStruct` tells the axes alone, and is the unit of the fold."""
    params, fn, shape = {"w": STACK}, lambda p, x: scan(p["w"], x), jax.ShapeDtypeStruct(X.shape, X.dtype)
    stats = jq.calibrate(fn, params, [X])
    assert same(jq.calibrate(fn, params, [shape]), jax.tree.map(jnp.zeros_like, stats))
    assert same(jq.calibrate(fn, params, [shape, X, shape]), stats)


def test_one_trace_for_each_shape():
    """Law: the function is traced once for all batches of a shape, whatever their order."""
    traces = []

    def fn(params, x):
        traces.append(x.shape)
        return mlp(params, x)

    jq.calibrate(fn, UV, [X, X, X[:2], X, X[:2]])
    assert traces == [X.shape, X[:2].shape]


def test_where_gram_and_progress():
    """Law: what is not chosen is not observed, what is not asked for not gathered; progress hears of every batch."""
    heard = []
    progress = lambda batches: (heard.append(batch.shape) or batch for batch in batches)  # noqa: E731
    where = lambda path, leaf: path == "v" and leaf.ndim == 2  # noqa: E731
    stats = jq.calibrate(mlp, UV, [X, X[:2]], where=where, gram=False, progress=progress)
    assert set(stats) == {"v"} and stats["v"].gram is None and heard == [X.shape, X[:2].shape]
    assert np.array_equal(stats["v"].absmax, jq.calibrate(mlp, UV, [X, X[:2]])["v"].absmax)


def test_qtensors_are_observed_after_the_transform_of_their_inputs():
    """Law: absmax is that of `x * factor`; a float weight beside it sees x, and the one after it what it puts out."""

    def fn(p, x):
        return x @ p["w"], act(x @ p["u"]) @ p["v"], x @ p["w"]

    floats = {"w": W, **UV}
    stats = jq.calibrate(fn, floats, [X])
    smooth = jq.quantize_params(floats, jq.smoothquant(jq.rtn(jq.int8)), stats=stats)
    after = jq.calibrate(fn, smooth | {"w": W}, [X])
    factors = {path: smooth[path].transform[0].factor[:, 0] for path in smooth}
    np.testing.assert_allclose(after["u"].absmax, stats["u"].absmax * factors["u"], rtol=1e-6)
    hidden = act(X @ np.asarray(jq.dequantize(smooth["u"])))
    np.testing.assert_allclose(after["v"].absmax, np.abs(hidden).max(0) * factors["v"], rtol=1e-5)
    assert same(after["w"], stats["w"])
    beside = jq.calibrate(lambda p, x: (x @ p["u"], x @ p["w"]), smooth | {"w": W}, [X])
    assert same(beside["w"], stats["w"])


def test_turned_weights_are_observed_as_the_upright_ones():
    """Law: the same paths, axes and numbers, of matrices, stacks and transposed weights, and of shapes alone."""

    def fn(p, x):
        return scan(p["stack"], act(act(x @ p["w"]) @ p["tied"].T)), x @ p["embedding"].T, x @ p["beside"]

    floats = {"stack": STACK, "w": W, "tied": W.T, "embedding": W.T, "beside": W}
    qparams = jq.quantize_params(floats, where=lambda path, leaf: path not in ("embedding", "beside"))
    qparams = jq.quantize_params(qparams, jq.int4, where=lambda path, leaf: path == "embedding")
    turned = jq.turned(qparams)
    assert all(isinstance(turned[path], jq.Turned) for path in ("stack", "w", "tied"))
    assert isinstance(turned["embedding"].codes, Packed)
    expected = jq.calibrate(fn, qparams, [X, X[:2]])
    assert same(jq.calibrate(fn, turned, [X, X[:2]]), expected) and set(expected) == set(floats)
    heard = []
    jq.calibrate(fn, turned, [X], where=lambda path, leaf: heard.append((path, leaf.shape)) or True)
    assert dict(heard) == {path: leaf.shape for path, leaf in floats.items()}
    shapes = jax.eval_shape(lambda: turned)
    zeros = jq.calibrate(fn, shapes, [jax.ShapeDtypeStruct(X.shape, X.dtype)])
    assert same(zeros, jax.tree.map(jnp.zeros_like, expected))


# The zoo

every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def stats_of(name):
    """Statistics of a model's own arguments."""
    model = MODELS[name]()
    return jq.calibrate(model.fn, model.params, [model.args])


def leaves_of(name):
    """The parameters of a model by path."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(MODELS[name]().params)[0]}


def first(out):
    """A model's prediction, without the state that may come with it."""
    return jax.tree.leaves(out)[0]


def tr_dgd(d, stats):
    """`tr(D^T G D)` for each matrix of a parameter, in float64."""
    d = np.asarray(Matrices.of(d.ndim, stats.stack, stats.inputs).take(jnp.asarray(d)), np.float64)
    return np.einsum("...io,...ij,...jo->...", d, np.asarray(stats.gram, np.float64), d).reshape(-1)


@every_model
def test_statistics_of_every_model(name):
    """Law: every matrix is observed; sum |x| <= count max|x|, sum x^2 <= max|x| sum |x|, and the Gram matrix is one."""
    stats, leaves = stats_of(name), leaves_of(name)
    assert set(stats) == {path for path, leaf in leaves.items() if eqx.is_inexact_array(leaf) and is_matrix(path, leaf)}
    for path, found in stats.items():
        assert axes_of(path, leaves[path], leaves, None).inputs == found.inputs
        parts = (found.count, found.absmax, found.abssum, found.gram)
        count, absmax, abssum, gram = (np.asarray(part, np.float64) for part in parts)
        diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
        assert count.sum() > 0 and np.all(np.diff(found.above) <= 0)
        assert np.all(abssum <= count[..., None] * absmax * (1 + 1e-6))
        assert np.all(diagonal <= absmax * abssum * (1 + 1e-5))
        # Not to the last bit: which of two products is added to the other first, the kernels of some CPUs do not keep.
        sizes = np.sqrt(diagonal[..., None] * diagonal[..., None, :])
        assert np.all(np.abs(gram - gram.swapaxes(-1, -2)) <= 1e-5 * sizes)
        assert np.all(np.linalg.eigvalsh(gram) >= -1e-5 * diagonal.max(-1, keepdims=True))


# The weight whose products are the output itself, up to what is added to them; of layers in a loop, the last.
LAST = {
    **{"linen_mlp": "Dense_1", "linen_cnn": "Dense_0", "linen_scan_remat": "Dense_0", "haiku_transformer": "linear_1"},
    **{"nnx_mlp": "down", "nnx_attention": "out", "nnx_scan": "down", "nnx_vmap": "down"},
    **{"equinox_mlp": "layers/2", **{f"plain_{name}": "down" for name in ("mlp", "scan", "ragged_moe", "picked_moe")}},
}


@pytest.mark.parametrize("name", LAST)
def test_the_gram_matrix_tells_what_an_error_does_to_the_output(name):
    """Law: `sum |y(w + D) - y(w)|^2 == tr(D^T G D)` where the output is linear in w, summed over a stack."""
    model, stats, leaves = MODELS[name](), stats_of(name), leaves_of(name)
    (path,) = [path for path in stats if LAST[name] in path]
    d = np.random.default_rng(0).standard_normal(leaves[path].shape).astype(np.float32)
    if "scan" in name:
        d[:-1] = 0

    def output(w):
        params = jax.tree.structure(model.params).unflatten((leaves | {path: w}).values())
        return first(model.fn(params, *model.args))

    change = jax.jit(lambda w, d: jax.jvp(output, (w,), (d,))[1])(leaves[path], d)
    predicted = tr_dgd(d, stats[path]).sum()
    np.testing.assert_allclose(np.sum(np.square(np.asarray(change, np.float64))), predicted, rtol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_quantizers_on_models(name):
    """Law: on its own objective GPTQ is nowhere worse than nearest rounding and better on the whole; statistics tell a
    format the axes that names tell it.

    A group of 8 normal weights is rounded in steps of its largest / 7, which is 0.2 rms, an error of 0.2 / sqrt(12) or
    6 % of a matmul's output. Nine matmuls in a row, whose errors add in squares, stay within 18 %.
    """
    model, stats, leaves = MODELS[name](), stats_of(name), leaves_of(name)
    q = jq.quantize_params(model.params, jq.gptq(FORMAT), stats=stats)
    trees = q, jq.quantize_params(model.params, FORMAT, stats=stats), jq.quantize_params(model.params, FORMAT)
    flat = [jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor)) for tree in trees]
    ours, nearest, by_names = (dict(zip(leaves, written, strict=True)) for written in flat)
    for path, found in stats.items():
        assert same(nearest[path], by_names[path]) and ours[path].shape == leaves[path].shape
        losses = [tr_dgd(leaves[path] - jq.dequantize(written[path]), found) for written in (ours, nearest)]
        assert np.all(losses[0] <= losses[1] * (1 + 1e-4)) and losses[0].sum() < losses[1].sum()

    @eqx.filter_jit
    def outputs(params, q, args):
        return first(model.fn(params, *args)), first(jq.quantized(model.fn, activations=None)(q, *args))

    expected, got = outputs(model.params, q, model.args)
    assert 0 < np.linalg.norm(got - expected) < 0.18 * np.linalg.norm(expected)


# Errors


def failing():
    """Two good batches, and a reader that breaks."""
    yield from (X, X)
    raise OSError("disk full")


def spoilt(value):
    """A batch with one number that is none."""
    return np.where(np.arange(K) == 3, np.float32(value), X)


BATCHES = {
    "none": ([], errors.CalibrationError, "no batch"),
    "a reader that fails": (failing(), errors.CalibrationError, "batch 2 .*2 good.*disk full"),
    "too narrow": ([X, X[:, :4]], errors.CalibrationError, "batch 1"),
    "another dtype": ([X, X, X.astype(np.int32)], errors.CalibrationError, "batch 2"),
    "another rank": ([X, X[0]], errors.CalibrationError, "batch 1"),
    "too many arguments": ([(X, X)], errors.CalibrationError, "batch 0"),
    "no array": (["text"], errors.CalibrationError, "batch 0"),
    "NaN": ([X, spoilt(np.nan)], errors.NonFiniteError, "batch 1 .*u"),
    "infinity": ([spoilt(np.inf)], errors.NonFiniteError, "batch 0 .*u"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_bad_batches(name):
    """Contract: an error that says which batch, and which parameter where there is one to blame."""
    batches, error, message = BATCHES[name]
    with pytest.raises(error, match=message):
        jq.calibrate(lambda p, x: mlp(p, x[:, :]), UV, batches)


def test_an_error_of_a_framework_names_the_batch():
    """Contract: also where it is no `ValueError`, as Flax's of a batch of the wrong width."""
    model = MODELS["linen_mlp"]()
    with pytest.raises(errors.CalibrationError, match="batch 1"):
        jq.calibrate(model.fn, model.params, [*model.args, model.args[0][:, :8]])


_CONV = functools.partial(jax.lax.conv_general_dilated, window_strides=(1,), padding="SAME", batch_group_count=2)
_SHARDED = jax.shard_map(
    jnp.matmul,
    mesh=jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)),
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(),
)
UNSEEN = {
    "a part of the inputs": lambda w, x: x[:, :4] @ w[0, :4],
    "an axis contracted and batch": lambda w, x: jnp.einsum("tab,abn->atn", x.reshape(T, 4, 2), w[0].reshape(4, 2, K)),
    "inputs that are outputs elsewhere": lambda w, x: (x @ w[0]) @ w[0].T,
    "a stack and its element": lambda w, x: scan(w, x @ w[0]),
    "the rest of a stack": lambda w, x: scan(w[1:], x),
    "running indices": lambda w, x: turns(
        2, x, lambda i, x: turns(2, x, lambda j, x: x @ w.reshape(NESTED.shape)[i, j])
    ),
    "two experts, one input": lambda w, x: jnp.einsum("tk,tskn->tsn", x, w[PAIRS]),
    "a grouped batch": lambda w, x: _CONV(x[:4, :, None], w),
    "shard_map": lambda w, x: _SHARDED(x, w[0]),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_weight_whose_inputs_cannot_be_told(name):
    """Contract: an error with its path, never statistics of something else."""
    with pytest.raises((errors.UnseenError, errors.StatsError), match=r"\blayers/w\b"):
        jq.calibrate(lambda p, x: UNSEEN[name](p["layers"]["w"], x), {"layers": {"w": STACK}}, [X])


def test_where_that_matches_nothing():
    """Contract: the error lists what there is."""
    with pytest.raises(errors.NoMatchError, match="u, v"):
        jq.calibrate(mlp, UV, [X], where=lambda path, leaf: False)
