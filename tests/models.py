"""The zoo: one table of models, as they are written in each framework, tiny and untrained.

A model is a pure function `fn(params, *args)`, its float parameters and its arguments; the last argument is a float
array, so that every model has an input to differentiate by, and the nonlinearities are smooth, so that a small error
of an input is a small error of a gradient. All inner sizes are multiples of 8, for groups of 8.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from processes import QUICK

WIDTH, HEADS, LAYERS, TOKENS, BATCH, VOCABULARY = 16, 2, 3, 6, 2, 24


@dataclasses.dataclass(frozen=True)
class Model:
    """A function of parameters, its parameters, and its other arguments."""

    fn: Callable
    params: Any
    args: tuple


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """N(0, 1) in float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def weight(*shape: int, seed: int = 0) -> jax.Array:
    """A matrix (or a stack of them) that keeps the size of what it multiplies."""
    return normal(*shape, seed=seed) / np.sqrt(shape[-2]).astype(np.float32)


def quickly_jitted(fn: Callable) -> Callable:
    """Compiled with few optimizations, where it is not the compiled program that matters."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def jitted_as_shipped(fn: Callable) -> Callable:
    """Compiled with XLA's own fusions, which `conftest.py` switches off: for real models, and once for every other."""
    return jax.jit(fn, compiler_options={"xla_cpu_use_fusion_emitters": True} if QUICK else None)


def tokens(*shape: int) -> jax.Array:
    """Token ids."""
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, shape), jnp.int32)


def _relaxed(fn: Callable) -> Callable:
    """The function under JAX's default promotion, which the frameworks rely on."""

    @functools.wraps(fn)
    def relaxed(*args):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return fn(*args)

    return relaxed


# Flax Linen


def _linen(module: nn.Module, *args) -> Model:
    return Model(_relaxed(module.apply), quickly_jitted(_relaxed(module.init))(jax.random.key(0), *args), args)


class _Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(2 * WIDTH)(x))
        return nn.Dense(WIDTH)(nn.LayerNorm()(x))


class _Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Conv(WIDTH, (3, 3))(x))
        x = nn.silu(nn.Conv(WIDTH, (3, 3), strides=2, feature_group_count=2)(x))
        return nn.Dense(8)(nn.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(WIDTH)(nn.silu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))), None


class _Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids, x):
        embed = nn.Embed(VOCABULARY, WIDTH)
        x = embed(ids) + x
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(nn.LayerNorm()(x))
        x, _ = _Block()(x)
        return embed.attend(nn.LayerNorm()(x))


class _Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.remat(_Block, prevent_cse=False)
        layers = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return layers()(x, None)[0]


def linen_mlp() -> Model:
    """Dense layers around a norm."""
    return _linen(_Mlp(), normal(BATCH, WIDTH))


def linen_cnn() -> Model:
    """Convolutions, one of them strided and in feature groups."""
    return _linen(_Cnn(), normal(BATCH, 8, 8, 8))


def linen_transformer() -> Model:
    """Attention with kernels of rank 3, and an embedding that is also the output layer."""
    return _linen(_Transformer(), tokens(BATCH, TOKENS), normal(BATCH, TOKENS, WIDTH))


def linen_scan_remat() -> Model:
    """`nn.scan` over layers with `nn.remat`."""
    return _linen(_Scanned(), normal(BATCH, WIDTH))


# Flax NNX


def _nnx(create: Callable[[nnx.Rngs], nnx.Module], *args, call=lambda module, *args: module(*args)) -> Model:
    graphdef, state = nnx.split(nnx.jit(lambda: create(nnx.Rngs(0)))())
    return Model(_relaxed(lambda state, *args: call(nnx.merge(graphdef, state), *args)), state, args)


class _NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(2 * WIDTH, rngs=rngs), nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.silu(self.norm(self.up(x)))))


class _NnxLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.up(x)))


class _NnxStack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return _NnxLayer(rngs)

        self.layers = create(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def nnx_mlp() -> Model:
    """Dropout and BatchNorm in training; the state that comes out holds the parameters, unchanged."""

    def train(module, x):
        y = module(x)
        return y, nnx.state(module, nnx.BatchStat), nnx.state(module, nnx.Param)

    return _nnx(_NnxMlp, normal(16, WIDTH), call=train)


def nnx_attention() -> Model:
    """Attention of one sequence to another."""

    def create(rngs):
        return nnx.MultiHeadAttention(HEADS, WIDTH, WIDTH, decode=False, rngs=rngs)

    return _nnx(create, normal(BATCH, TOKENS, WIDTH, seed=1), normal(BATCH, TOKENS, WIDTH))


def nnx_scan() -> Model:
    """Layers made by `nnx.vmap` and run by `nnx.scan`."""
    return _nnx(_NnxStack, normal(BATCH, WIDTH))


def nnx_vmap() -> Model:
    """An ensemble: one input through every one of the stacked layers."""

    def ensemble(module, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(module.layers, x)

    return _nnx(_NnxStack, normal(BATCH, WIDTH), call=ensemble)


# Equinox and Haiku


def equinox_mlp() -> Model:
    """`weight @ x`, the weight on the left, for one example at a time under `vmap`; functions among the leaves."""
    mlp = eqx.filter_jit(eqx.nn.MLP)(WIDTH, 8, 2 * WIDTH, 2, key=jax.random.key(0))
    return Model(_relaxed(lambda mlp, x: jax.vmap(mlp)(x)), mlp, (normal(BATCH, WIDTH),))


def equinox_cnn() -> Model:
    """Kernels `[out, in, height, width]` over images `[channels, height, width]`."""

    @eqx.filter_jit
    def create(keys):
        first = eqx.nn.Conv2d(8, WIDTH, (3, 8), padding="SAME", key=keys[0])
        second = eqx.nn.Conv2d(WIDTH, 8, (3, 8), stride=2, groups=2, key=keys[1])
        return eqx.nn.Sequential([first, eqx.nn.Lambda(jax.nn.silu), second])

    net = create(jax.random.split(jax.random.key(0)))
    return Model(_relaxed(lambda net, x: jax.vmap(net)(x)), net, (normal(BATCH, 8, 8, 8),))


def haiku_transformer() -> Model:
    """`hk.MultiHeadAttention` and `hk.nets.MLP`."""

    def forward(x):
        x = x + hk.MultiHeadAttention(HEADS, 8, w_init=hk.initializers.VarianceScaling(), model_size=WIDTH)(x, x, x)
        return hk.nets.MLP([2 * WIDTH, WIDTH])(hk.LayerNorm(-1, True, True)(x))

    model, args = hk.without_apply_rng(hk.transform(forward)), (normal(BATCH, TOKENS, WIDTH),)
    return Model(_relaxed(model.apply), quickly_jitted(_relaxed(model.init))(jax.random.key(0), *args), args)


# Plain JAX


def plain_mlp() -> Model:
    """Two matmuls."""

    def fn(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    params = {"up": weight(WIDTH, 2 * WIDTH), "down": weight(2 * WIDTH, WIDTH, seed=1)}
    return Model(fn, params, (normal(BATCH, WIDTH),))


def plain_scan() -> Model:
    """`lax.scan` over stacked layers."""

    def fn(params, x):
        def layer(x, slices):
            return x + jnp.tanh(x @ slices["up"]) @ slices["down"], None

        return jax.lax.scan(layer, x, params)[0]

    params = {"up": weight(LAYERS, WIDTH, 2 * WIDTH), "down": weight(LAYERS, 2 * WIDTH, WIDTH, seed=1)}
    return Model(fn, params, (normal(BATCH, WIDTH),))


def plain_moe() -> Model:
    """Every token through every expert, weighted by a router."""

    def fn(params, x):
        gates = jax.nn.softmax(x @ params["router"])
        hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, params["up"]))
        return jnp.einsum("te,ted->td", gates, jnp.einsum("tef,efd->ted", hidden, params["down"]))

    params = {
        "router": weight(WIDTH, 8),
        "up": weight(8, WIDTH, 2 * WIDTH, seed=1),
        "down": weight(8, 2 * WIDTH, WIDTH, seed=2),
    }
    return Model(fn, params, (normal(TOKENS, WIDTH),))


def plain_ragged_moe() -> Model:
    """Sorted tokens, each through its own expert, by `ragged_dot`."""

    def fn(params, sizes, x):
        hidden = jax.nn.silu(jax.lax.ragged_dot(x, params["up"], sizes))
        return jax.lax.ragged_dot(hidden, params["down"], sizes)

    params = {"up": weight(3, WIDTH, 2 * WIDTH), "down": weight(3, 2 * WIDTH, WIDTH, seed=1)}
    return Model(fn, params, (jnp.array([2, 0, 4], jnp.int32), normal(TOKENS, WIDTH)))


def plain_picked_moe() -> Model:
    """One expert per token, its matrices picked by a gather."""

    def fn(params, chosen, x):
        up, down = params["up"][chosen], params["down"][chosen]
        return jnp.einsum("tf,tfd->td", jax.nn.silu(jnp.einsum("td,tdf->tf", x, up)), down)

    params = {"up": weight(3, WIDTH, 2 * WIDTH), "down": weight(3, 2 * WIDTH, WIDTH, seed=1)}
    return Model(fn, params, (jnp.array([2, 0, 1, 2], jnp.int32), normal(4, WIDTH)))


def plain_lstm() -> Model:
    """A scan over time whose weights are constants of the loop."""

    def fn(params, x):
        def step(state, x):
            hidden, cell = state
            gates = x @ params["input"] + hidden @ params["hidden"] + params["bias"][None, :]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (hidden, cell), hidden

        zeros = jnp.zeros(x.shape[1:], x.dtype)
        return jax.lax.scan(step, (zeros, zeros), x)[1]

    params = {
        "input": weight(WIDTH, 4 * WIDTH),
        "hidden": weight(WIDTH, 4 * WIDTH, seed=1),
        "bias": normal(4 * WIDTH),
    }
    return Model(fn, params, (normal(TOKENS, BATCH, WIDTH),))


_BUILDERS = (
    linen_mlp,
    linen_cnn,
    linen_transformer,
    linen_scan_remat,
    nnx_mlp,
    nnx_attention,
    nnx_scan,
    nnx_vmap,
    equinox_mlp,
    equinox_cnn,
    haiku_transformer,
    plain_mlp,
    plain_scan,
    plain_moe,
    plain_ragged_moe,
    plain_picked_moe,
    plain_lstm,
)
# One of each framework and of each kind of matmul, for laws that are long to check and hold of the others elsewhere.
FEW = ("linen_cnn", "nnx_scan", "equinox_mlp", "haiku_transformer", "plain_moe", "plain_lstm")
# Built when first asked for: a model costs a second, and one test needs one.
MODELS: dict[str, Callable[[], Model]] = {builder.__name__: functools.cache(builder) for builder in _BUILDERS}
