"""Law 3: `qat(fn, w)(params, x)` is `quantized(fn)(quantize_params(params, w), x)`, and what flows back through it.

Parity       on every model of the zoo and every kind of format: to float tolerance, the same program after all
Gradient     that of fn at the decoded weights and the unquantized activations, masked where a weight is clipped
Optimizers   any of optax, under jit, accumulation, remat, bf16, and a mesh
"""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import FEW, MODELS, WIDTH, normal, quickly_jitted, weight
from tables import FORMATS, as_shipped, same, table

import jaxquant as jq
from jaxquant.errors import FormatError, NoMatchError, NonFiniteError, OptionError
from jaxquant.learned import Clipped, Stepped
from jaxquant.trace import path_name

TOLERANCE = 256 * np.finfo(np.float32).eps
SMALL = {"int8": jq.int8, "int4-affine": jq.int4(group=8, symmetric=False), "nf4": jq.nf4(group=8), "fp8": jq.fp8}
QUANTIZERS = {
    "least squares": jq.rtn(jq.int4(group=8), jq.least_squares),
    "rotated": jq.rotated(jq.rtn(jq.int4(group=8))),
    "hqq": jq.hqq(jq.int4(group=8, symmetric=False)),
    "stochastic": jq.stochastic(jq.int4(group=8), jax.random.key(3)),
    "at 4 bits": jq.at_bits(jnp.asarray(4), jq.int8(group=8)),
}


def arrays_of(name):
    """A model's parameters as `(arrays, static)`."""
    return eqx.partition(MODELS[name]().params, eqx.is_array)


def over(name, fn):
    """A function of the arrays of a model's parameters."""
    static = arrays_of(name)[1]
    return lambda arrays, *args: fn(eqx.combine(arrays, static), *args)


def floats(tree):
    """The float arrays among the results."""
    leaves = jax.tree.leaves(jq.dequantize(tree))
    return [np.asarray(leaf, np.float64) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


@pytest.fixture
def relaxed():
    """JAX's default promotion, which optax relies on."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def close(a, b, tolerance=TOLERANCE):
    """Equal up to a share of the largest number of each array."""
    pairs = list(zip(floats(a), floats(b), strict=True))
    assert pairs
    for x, y in pairs:
        assert np.max(np.abs(x - y), initial=0) <= tolerance * max(np.max(np.abs(y), initial=0), 1)


# The groups and zero points that views move meet every model; codes that are no integers, a model of each kind.
MET = [(name, format) for name in MODELS for format in SMALL if format.startswith("int") or name in FEW]


@pytest.mark.parametrize("name, format", MET)
def test_training_sees_what_serving_does(name, format):
    """Law 3 on the zoo: forwards of training and serving agree, where weights are in codes of every kind."""
    model, format = MODELS[name](), SMALL[format]
    served = over(name, lambda params, *args: jq.quantized(model.fn)(jq.quantize_params(params, format), *args))
    trained = over(name, jq.qat(model.fn, format))
    arrays = arrays_of(name)[0]
    # Whole states come back from some models: QTensors there, float arrays here.
    both = quickly_jitted(lambda *args: [jax.tree.leaves(run(*args))[0] for run in (trained, served)])
    close(*both(arrays, *model.args))


@pytest.mark.parametrize("format", **table(FORMATS))
def test_eager_and_jitted_training_see_what_serving_does(format):
    """Law 3 for every format, symmetric or not, per tensor, channel and group: eager == jit == served."""
    params, x, fn = {"w": weight(32, 24)}, normal(5, 32), lambda params, x: x @ params["w"]
    served = jq.quantized(fn)(jq.quantize_params(params, format), x)
    close(jq.qat(fn, format)(params, x), served, 0)
    close(jax.jit(jq.qat(fn, format))(params, x), served)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_any_quantizer_trains(name):
    """Law 3 for quantizers that search, transform inputs, round at random or have a traced width."""
    params, x, quantizer = {"w": weight(16, 8)}, normal(5, 16), QUANTIZERS[name]
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    trained, served = jq.qat(fn, quantizer), jq.quantized(fn)(jq.quantize_params(params, quantizer), x)
    close(trained(params, x), served, 0)
    gradient = jax.grad(lambda params: jnp.sum(trained(params, x)))(params)["w"]
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)


def test_with_scales_that_are_powers_of_two_it_is_equal_bit_for_bit():
    """Law 3, exactly, and exactly the float result too: every product and sum is a whole number of steps."""
    w = jnp.round(127 * jnp.clip(weight(64, 32), -1, 1)).at[0].set(127.0) / 128 * 127 / 127
    x = jnp.round(20 * normal(8, 64)).at[:, 0].set(127.0)
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    params = {"w": w * 128}
    for run in (jq.qat(fn), jax.jit(jq.qat(fn))):
        out = run(params, x)
        assert same(out, jq.quantized(fn)(jq.quantize_params(params), x)) and same(out, x @ params["w"])


def mlp(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


MLP = {"w1": weight(WIDTH, 24), "w2": weight(24, 8, seed=1)}


@pytest.mark.parametrize("format", [jq.int8, jq.int2(group=8), jq.int3(group=8, symmetric=False), jq.nf4(group=8)])
def test_the_gradient_is_the_one_derived_by_hand(format):
    """h = [x] v1, a = tanh h, y = [a] v2: dv2 = a^T c, dh = (c v2^T)(1 - a^2), dv1 = x^T dh, dx = dh v1^T."""
    x, c = normal(6, WIDTH, seed=2), normal(6, 8, seed=3)
    _, pull = jax.vjp(jax.jit(jq.qat(mlp, format)), MLP, x)
    got, dx = pull(c)
    qparams = jq.quantize_params(MLP, format)
    v1, v2 = (np.asarray(jq.dequantize(qparams[k]), np.float64) for k in ("w1", "w2"))
    hidden = jq.quantized(lambda params, x: x @ params["w1"])(qparams, x)
    a = np.tanh(np.asarray(hidden, np.float64))
    dh = (np.asarray(c, np.float64) @ v2.T) * (1 - a**2)
    expected = {"w1": np.asarray(x, np.float64).T @ dh, "w2": a.T @ np.asarray(c, np.float64)}
    close(got, expected, 1e-5)  # the whole range is kept, so no weight is clipped
    close(dx, dh @ v1.T, 1e-5)


@pytest.mark.parametrize("format", [jq.int4(group=8), jq.int4(group=8, symmetric=False)])
def test_clipped_weights_get_no_gradient(format):
    """Where the searched range leaves a weight out by more than half a step, its gradient is 0, and 1 elsewhere."""
    w = jnp.asarray(np.random.default_rng(0).standard_t(2, (64, 16)), jnp.float32)
    quantizer = jq.rtn(format, jq.least_squares)
    q = jq.quantize_params({"w": w}, quantizer)["w"]
    beyond = np.abs(np.asarray(w - jq.dequantize(q))) > 0.5001 * np.repeat(np.asarray(q.scale), 8, 0)
    gradient = jax.grad(lambda w: jnp.sum(jq.qat(lambda p, x: x @ p["w"], quantizer)({"w": w}, jnp.ones((1, 64)))))(w)
    assert beyond.any() and np.array_equal(np.asarray(gradient), np.where(beyond, 0.0, 1.0))


@pytest.mark.parametrize("fill", [0.0, 2.5])
@pytest.mark.parametrize("format", table(FORMATS)["argvalues"], ids=table(FORMATS)["ids"])
def test_gradients_of_constant_and_zero_weights_are_finite(format, fill):
    params = {"w": jnp.full((32, 4), fill)}
    gradient = jax.grad(lambda params: jnp.sum(jq.qat(lambda p, x: x @ p["w"], format)(params, normal(3, 32))))(params)
    assert np.all(np.isfinite(gradient["w"]))


def test_what_serving_leaves_alone_training_leaves_alone():
    """What `where` leaves out, biases and norms stay in float; `where` that chooses nothing is an error, as there."""
    params = {"kernel": weight(16, 8), "bias": normal(1, 8), "other": weight(8, 8), "scale": normal(1, 8)}
    fn = lambda p, x: jnp.sin((x @ p["kernel"] + p["bias"]) * p["scale"]) @ p["other"]  # noqa: E731
    where, x = lambda path, array: path == "kernel", normal(2, 16)
    trained, qparams = jq.qat(fn, jq.int2, where=where), jq.quantize_params(params, jq.int2, where=where)
    close(trained(params, x), jq.quantized(fn)(qparams, x), 0)
    gradient = jax.grad(lambda p: jnp.sum(trained(p, x)))(params)
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradient))
    with pytest.raises(NoMatchError):
        jq.qat(fn, where=lambda *_: False)(params, x)


# Parameters of the ranges.


def test_learned_steps_have_the_gradient_of_lsq():
    """dv/ds = round(w/s) - w/s inside and qmin or qmax outside, each step's divided by sqrt(members * qmax)."""
    format, w = jq.int4(group=8), 2 * weight(32, 4)
    (leaf,) = jax.tree.leaves(jq.learn_steps({"w": w}, format), is_leaf=lambda leaf: isinstance(leaf, Stepped))
    leaf = dataclasses.replace(leaf, scale=0.6 * leaf.scale)  # so that some are outside
    c = normal(32, 4, seed=5)
    fn = lambda p: jnp.sum(jq.qat(lambda p, x: x @ p["w"], format, activations=None)(p, jnp.eye(32)) * c)  # noqa: E731
    got = jax.grad(fn)({"w": leaf})["w"]
    s = np.repeat(np.asarray(leaf.scale, np.float64), 8, 0)
    ratio = np.asarray(w, np.float64) / s
    inside = np.abs(ratio) <= 7.5
    moved = np.where(inside, np.clip(np.round(ratio), -7, 7) - ratio, np.sign(ratio) * 7) * np.asarray(c)
    assert (~inside).any()
    np.testing.assert_allclose(got.scale, moved.reshape(4, 8, 4).sum(1) / np.sqrt(8 * 7), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.weight, np.where(inside, c, 0), rtol=1e-6)


def test_learned_clips_move_with_what_lies_beyond_them():
    """scale = clip * max|w| / qmax: dv/dclip is dv/dscale * max|w| / qmax, and only clipped weights pull at 0.5."""
    format, w = jq.int8, weight(64, 4)
    leaf = jq.learn_clips({"w": w}, format)["w"]
    assert isinstance(leaf, Clipped)
    leaf = dataclasses.replace(leaf, clip=0.5 * leaf.clip)
    fn = lambda p: jnp.sum(jq.qat(lambda p, x: x @ p["w"], format, activations=None)(p, jnp.eye(64)))  # noqa: E731
    got = jax.grad(fn)({"w": leaf})["w"]
    top = np.max(np.abs(np.asarray(w)), 0)
    beyond = np.abs(np.asarray(w)) > 0.5 * top * (1 + 0.5 / 127)
    pulled = np.where(beyond, np.sign(w), 0).sum(0) * top
    assert beyond.any()
    # Inside, what is rounded off pulls by half a step at most.
    assert np.all(np.abs(got.clip[0] - pulled) <= 64 * 0.5 * top / 127 + 1e-5)
    np.testing.assert_allclose(got.weight, np.where(beyond, 0, 1), atol=1e-6)


@pytest.mark.usefixtures("relaxed")
@pytest.mark.parametrize("learn", [jq.learn_steps, jq.learn_clips])
@pytest.mark.parametrize("format", [jq.int4(group=8), jq.int3(group=8, symmetric=False)])
def test_learned_ranges_start_where_the_quantizer_is_and_serve_what_they_trained(learn, format):
    """Law 3 with parameters of ranges: at the start they change nothing, and after steps of an optimizer it holds."""
    x, target = normal(12, WIDTH), normal(12, 8, seed=9)
    tree = learn(MLP, jq.rtn(format, jq.least_squares) if learn is jq.learn_steps else format)
    fn = jax.jit(jq.qat(mlp, format))
    start = jq.rtn(format, jq.least_squares) if learn is jq.learn_steps else format
    close(fn(tree, x), jq.qat(mlp, start)(MLP, x))
    optimizer = optax.adam(1e-2)
    loss = lambda tree: jnp.mean((fn(tree, x) - target) ** 2)  # noqa: E731

    @jax.jit
    def step(tree, state):
        updates, state = optimizer.update(jax.grad(loss)(tree), state)
        return optax.apply_updates(tree, updates), state

    state, before = optimizer.init(tree), loss(tree)
    for _ in range(20):
        tree, state = step(tree, state)
    assert loss(tree) < before
    moved = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if path_name(path).endswith("clip")]
    assert all(np.any(leaf != 1) for leaf in moved)
    close(fn(tree, x), jq.quantized(mlp)(jq.quantize_params(tree, format), x))


# Rounding at random, schedules, widths.


def test_stochastic_rounding_is_right_on_average_and_repeats_for_a_key():
    w = {"w": weight(16, 8)}
    once = lambda key: jq.dequantize(jq.quantize_params(w, jq.stochastic(jq.int4, key)))["w"]  # noqa: E731
    assert same(once(jax.random.key(0)), once(jax.random.key(0)))
    many = np.asarray(jax.vmap(once)(jax.random.split(jax.random.key(1), 400)))
    exact, step = np.asarray(w["w"]), np.asarray(jq.quantize(w["w"], jq.int4).scale)
    # The noise of one rounding has a variance of at most a quarter of a step squared: five sigma of the mean.
    assert np.all(np.abs(np.mean(many, 0) - exact) <= 5 * 0.5 * step / np.sqrt(400))
    assert np.all(np.abs(many - exact) <= step * (1 + 1e-5))


def test_stacked_and_equal_matrices_round_at_random_apart():
    w = weight(2, 16, 8)
    q = jq.quantize_params({"w": w}, jq.stochastic(jq.int4, jax.random.key(0)))["w"]
    up = np.asarray(jq.dequantize(q) > w)
    assert 0.2 < np.mean(up[0] == up[1]) < 0.8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_compiled_program_sweeps_widths(bits):
    """at_bits(b) has the codes of rtn at b bits, whatever b is when it runs."""
    w = {"w": weight(32, 8)}
    write = jax.jit(lambda b: jq.dequantize(jq.quantize_params(w, jq.at_bits(b, jq.int8(group=8)))))
    plain = jq.dequantize(jq.quantize_params(w, jq.Format(bits, group=8)))
    np.testing.assert_allclose(write(jnp.asarray(bits))["w"], plain["w"], rtol=1e-6)


def test_a_schedule_starts_after_some_steps():
    """Before, it is the float function, bit for bit; then it is the quantized one; compiled once."""
    x = normal(4, WIDTH)
    step = jax.jit(lambda i, params: jq.qat(mlp, jq.int2, when=i >= 10)(params, x))
    assert same(step(9, MLP), jax.jit(mlp)(MLP, x))
    close(step(10, MLP), jq.quantized(mlp)(jq.quantize_params(MLP, jq.int2), x))
    assert step._cache_size() == 1


# How it is trained.

OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-2),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), 3),
    "masked": optax.masked(optax.adam(1e-2), {"w1": True, "w2": True}),
}


@functools.cache
def regression():
    x = normal(64, WIDTH)
    return x, mlp({"w1": weight(WIDTH, 24, seed=5), "w2": weight(24, 8, seed=6)}, x)


@pytest.mark.usefixtures("relaxed")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_below_what_rounding_costs(name):
    """After training through int3 weights the error is below that of the float weights rounded to int3."""
    (x, target), optimizer = regression(), OPTIMIZERS[name]
    fn = jq.qat(mlp, jq.int3)
    loss = jax.jit(lambda params: jnp.mean((fn(params, x) - target) ** 2))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = MLP, optimizer.init(MLP)
    before = loss(params)
    for _ in range(60):
        params, state = step(params, state)
    assert loss(params) < 0.8 * before


@pytest.mark.parametrize("name", ["linen_scan_remat", "nnx_vmap", "plain_moe", "equinox_cnn"])
def test_gradients_flow_through_scan_remat_vmap_experts_and_convolutions(name):
    """Every quantized weight gets a finite gradient that is not all zero, in its own shape and dtype."""
    model = MODELS[name]()
    arrays = arrays_of(name)[0]
    run = over(name, jq.qat(model.fn, jq.int4(group=8)))

    def total(arrays):
        return jnp.sum(jnp.square(jax.tree.leaves(run(arrays, *model.args))[0]))

    gradient = quickly_jitted(jax.grad(total, allow_int=True))(arrays)
    floating = [g for g in jax.tree.leaves(gradient) if jnp.issubdtype(g.dtype, jnp.floating)]
    assert floating and all(np.all(np.isfinite(g)) for g in floating)
    assert sum(bool(np.any(g != 0)) for g in floating) >= 0.7 * len(floating)


def test_bfloat16_weights_train_in_bfloat16():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), MLP)
    gradient = jax.grad(lambda p: jnp.sum(jq.qat(mlp, jq.int4(group=8))(p, normal(3, WIDTH).astype(jnp.bfloat16))))(
        params
    )
    assert all(g.dtype == jnp.bfloat16 and np.any(g != 0) for g in jax.tree.leaves(gradient))


def test_a_gradient_over_per_example_vmap_is_the_gradient_of_each():
    fn, xs = jq.qat(mlp, jq.int4(group=8)), normal(5, WIDTH)
    each = lambda x: jax.grad(lambda p: jnp.sum(fn(p, x[None]) ** 2))(MLP)  # noqa: E731
    mapped = jax.vmap(each)(xs)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *(each(x) for x in xs))
    close(mapped, stacked)


# Integers on the way back too.


def pulled(fn, params, x, c, **options):
    """The gradients of a linear function of the output."""
    return jax.grad(lambda params, x: jnp.sum(jq.qat(fn, **options)(params, x) * c), argnums=(0, 1))(params, x)


INTO = {"plain": ("tk,kn->tn", (6, 16), (16, 8)), "heads": ("btk,khn->bthn", (2, 3, 16), (16, 2, 4))}
INTO |= {"left": ("kn,tk->nt", (16, 8), (6, 16)), "stack": ("etk,ekn->etn", (3, 6, 16), (3, 16, 8))}


@pytest.mark.parametrize("name", INTO)
def test_a_backward_pass_in_integers_is_exact_where_nothing_is_rounded(name):
    """Law: with whole numbers whose largest in every row and column is 127, all scales are 1 and all sums exact."""
    equation, left, right = INTO[name]
    random = np.random.default_rng(0)

    def whole(*shape):
        # Every line along every axis has a 127: a diagonal of them in the last two axes, of either sign.
        w = random.integers(-5, 6, shape).astype(np.float32)
        return jnp.asarray(np.where(np.sum(np.indices(shape), 0) % min(shape) == 0, 127, w))

    a, b = whole(*left), whole(*right)
    x, w = (b, a) if name == "left" else (a, b)
    path = "query" if name == "heads" else "w"  # which tells the inputs of a kernel of rank 3
    fn = lambda p, x: jnp.einsum(equation, *((p[path]["w"], x) if name == "left" else (x, p[path]["w"])))  # noqa: E731
    params = {path: {"w": w}}
    c = whole(*jax.eval_shape(fn, params, x).shape)
    got = pulled(fn, params, x, c, gradients=jq.int8, key=jax.random.key(0))
    expected = jax.grad(lambda p, x: jnp.sum(fn(p, x) * c), argnums=(0, 1))(params, x)
    assert same(got[0], expected[0]) and same(got[1], expected[1])


def test_a_backward_pass_in_integers_is_right_on_average():
    """Rounding at random: the mean over keys is nearer to the float gradient than one, by the root of their number."""
    fn, params, x, c = lambda p, x: x @ p["w"], {"w": weight(32, 24)}, normal(16, 32), normal(16, 24, seed=3)
    exact = pulled(fn, params, x, c)[1]
    many = jax.vmap(lambda key: pulled(fn, params, x, c, gradients=jq.int4, key=key)[1])(
        jax.random.split(jax.random.key(0), 256)
    )
    off = np.asarray(many) - np.asarray(exact)[None]
    one, mean = np.sqrt(np.mean(off**2)), np.sqrt(np.mean(off.mean(0) ** 2))
    assert 0 < mean < 2 * one / 16


def test_all_three_matmuls_of_training_are_in_integers():
    def loss(p, x):
        return jnp.sum(jq.qat(mlp, gradients=jq.int8, key=jax.random.key(0))(p, x))

    step = jax.value_and_grad(loss, argnums=(0, 1))
    # As lowered for this platform: a jaxpr has the forms of the others too.
    program = jax.jit(step).lower(MLP, normal(8, WIDTH)).as_text()
    matmuls = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(matmuls) == 6
    assert all(line.rstrip().endswith("xi32>") for line in matmuls), matmuls


@pytest.mark.parametrize("name", ["linen_transformer", "linen_scan_remat", "nnx_vmap", "plain_moe", "equinox_cnn"])
@pytest.mark.parametrize("format", [jq.int8, jq.int4(group=8)])
def test_gradients_in_integers_point_where_float_ones_do(name, format):
    """On models, with a fallback to float where groups, convolutions and experts need it: cosine above 0.99."""
    model = MODELS[name]()
    arrays = arrays_of(name)[0]

    def gradient(**options):
        run = over(name, jq.qat(model.fn, format, **options))
        total = lambda arrays: jnp.sum(jnp.square(jax.tree.leaves(run(arrays, *model.args))[0]))  # noqa: E731
        leaves = jax.tree.leaves(quickly_jitted(jax.grad(total, allow_int=True))(arrays))
        return np.concatenate([np.ravel(g) for g in leaves if jnp.issubdtype(g.dtype, jnp.floating)])

    a, b = gradient(), gradient(gradients=jq.int8, key=jax.random.key(1))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


def test_gradients_that_cannot_be_are_errors():
    key = jax.random.key(0)
    for gradients, options in ((jq.int8, {}), (jq.int4(group=8), {"key": key}), ("int8", {"key": key})):
        with as_shipped(), pytest.raises(OptionError, match="gradients"):
            jq.qat(mlp, gradients=gradients, **options)


def test_ranges_and_widths_that_cannot_be_are_errors():
    rotated = jq.rotated(jq.rtn(jq.int4(group=8)))
    for learn in (jq.learn_steps, jq.learn_clips):
        with pytest.raises(OptionError, match="of a weight itself"):
            learn(MLP, rotated)
        with pytest.raises(OptionError, match="of a weight itself"):
            jq.qat(mlp, rotated)(learn(MLP, jq.int4(group=8)), normal(2, WIDTH))
    for bits in (1, 9):
        with pytest.raises(FormatError, match="from 2 to the 8 bits"):
            jq.at_bits(bits)
    with pytest.raises(FormatError, match="up or down"):
        jq.stochastic(jq.nf4, jax.random.key(0))


@pytest.mark.parametrize("options", [{}, {"gradients": jq.int8, "key": jax.random.key(0)}], ids=["float", "int8"])
def test_an_empty_batch_has_gradients_of_zero(options):
    gradient = jax.grad(lambda params: jnp.sum(jq.qat(mlp, **options)(params, jnp.zeros((0, WIDTH)))))(MLP)
    assert all(np.all(g == 0) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("compiled", [lambda f: f, jax.jit], ids=["eagerly", "compiled"])
def test_a_bad_activation_is_a_bad_gradient_in_integers(compiled):
    """Law: the gradient of the input's weights is NaN and the others are as they were, compiled or not."""
    x = jnp.asarray(normal(3, WIDTH)).at[1, 2].set(jnp.nan)
    step = jax.grad(lambda w, key: jnp.sum(jq.qat(lambda w, x: x @ w["w"], gradients=jq.int8, key=key)(w, x)))
    gradient = compiled(step)({"w": weight(WIDTH, 24)}, jax.random.key(0))["w"]
    assert np.array_equal(np.isnan(gradient).all(axis=1), np.arange(WIDTH) == 2)
    assert np.isnan(gradient).sum() == 24


@pytest.mark.parametrize("weights", [jq.int8, jq.int4(group=8), jq.nf4(group=8), jq.rotated(jq.rtn(jq.int4))])
def test_weights_that_have_become_nan_are_heard_of(weights):
    """A training that diverged must not look like one that goes on: eagerly an error, compiled a NaN."""
    params = MLP | {"w1": MLP["w1"].at[3, 2].set(jnp.nan)}
    assert np.all(np.isnan(jax.jit(jq.qat(mlp, weights))(params, normal(2, WIDTH))))
    with pytest.raises(NonFiniteError, match=r"w1\[3, 2\] is nan"):
        jq.qat(mlp, weights)(params, normal(2, WIDTH))
