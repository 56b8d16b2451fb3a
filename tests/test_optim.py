"""`adamw8bit`: AdamW with moments of a byte each. Against optax.adamw, on what it stores, and how it is resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import same

import jaxquant as jq
from jaxquant.errors import OptionError
from jaxquant.optim import _SIGNED, _UNSIGNED, Blocks, block_of, compress, expand


@pytest.fixture(autouse=True)
def relaxed():
    """JAX's default promotion, which optax relies on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("levels", [_SIGNED, _UNSIGNED], ids=["signed", "unsigned"])
def test_levels_increase_to_one(levels):
    assert len(levels) in (255, 256) and np.all(np.diff(levels) > 0) and levels[-1] == 1
    assert (0.0 in levels) == (levels is _SIGNED)  # a second moment that became 0 would be divided by


@given(
    shape=st.sampled_from([(1, 1, 16), (4, 3, 16), (3, 1, 64), (2, 2, 64)]),  # each compiles anew
    seed=st.integers(0, 99),
    scale=st.floats(-20, 20),
)
@settings(max_examples=40, deadline=None)
def test_codes_are_the_nearest_levels_of_each_block(shape, seed, scale):
    """Law: |x - decode| <= half the gap around x times the block's largest, which itself is exact."""
    rows, blocks, block = shape
    x = np.random.default_rng(seed).standard_normal((rows, blocks * block)) * 2.0**scale
    x = x.astype(np.float32)
    found = np.asarray(expand(compress(jnp.asarray(x), _SIGNED, block), _SIGNED))
    top = np.repeat(np.abs(x.reshape(rows, blocks, block)).max(-1), block, -1)
    levels = np.asarray(_SIGNED)
    nearest = np.abs((x / top)[..., None] - levels).min(-1)
    np.testing.assert_allclose(np.abs(found - x), nearest * top, atol=2e-7 * top.max())
    largest = np.abs(x) == top
    assert np.array_equal(found[largest], x[largest])


def problem():
    """Logistic regression of random labels on correlated inputs."""
    random = np.random.default_rng(0)
    x = random.standard_normal((256, 64)) @ random.standard_normal((64, 64)) / 8
    labels = jnp.asarray((x @ random.standard_normal((64, 16))).argmax(-1))
    x = jnp.asarray(x, jnp.float32)
    params = {"w": jnp.zeros((64, 128)), "v": 0.1 * jnp.asarray(random.standard_normal((128, 16)), jnp.float32)}

    def loss(params):
        logits = jnp.tanh(x @ params["w"] + 0.1) @ params["v"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return params, loss


def trained(optimizer, steps):
    params, loss = problem()
    state, losses = optimizer.init(params), []

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return params, state, losses


@pytest.mark.parametrize("rate", [3e-3, optax.cosine_decay_schedule(1e-2, 150)], ids=["constant", "schedule"])
def test_it_trains_as_adamw_does(rate):
    """Loss curves of both stay within a tenth of the float one at every step."""
    ours, theirs = (trained(make(rate, weight_decay=1e-3), 150)[2] for make in (jq.adamw8bit, optax.adamw))
    np.testing.assert_allclose(ours, theirs, rtol=0.1)
    assert ours[-1] < 0.3 * ours[0]


def test_with_small_arrays_in_float_it_is_adamw():
    """Where nothing is large enough for codes, it is optax.adamw to float tolerance."""
    make = {"learning_rate": 1e-2, "weight_decay": 1e-2}
    ours, theirs = trained(jq.adamw8bit(**make, smallest=10**9), 20)[0], trained(optax.adamw(**make), 20)[0]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_states_take_two_bytes_a_parameter():
    params = {
        "large": jnp.zeros((512, 1024)),
        "side": jnp.zeros((16, 576, 1)),
        "odd": jnp.zeros((4096, 7)),
        "small": jnp.zeros((64,)),
    }
    state = jq.adamw8bit(1e-3).init(params)
    size = {name: sum(p.nbytes for p in jax.tree.leaves((state.first[name], state.second[name]))) for name in params}
    assert size["large"] == 2 * 512 * 1024 * (1 + 4 / 256)
    assert size["side"] == 2 * 16 * 576 * (1 + 4 / 192)
    assert size["odd"] == 8 * params["odd"].size and size["small"] == 8 * 64  # in float


@pytest.mark.parametrize(
    "shape, block", [((512, 576), 192), ((512, 1536), 256), ((16, 576, 1), 192), ((4096, 7), None), ((), None)]
)
def test_blocks_divide_the_last_axis(shape, block):
    assert block_of(shape, 4096) == block


def test_it_goes_on_from_a_saved_state(tmp_path):
    """Saved and restored by orbax after ten steps, the next ten give the same bits."""
    checkpoint = pytest.importorskip("orbax.checkpoint")
    optimizer = jq.adamw8bit(1e-2)
    params, state, _ = trained(optimizer, 10)
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "at", state)
        saver.wait_until_finished()
        again = saver.restore(tmp_path / "at", jax.tree.map(jnp.zeros_like, state))
    assert same(again, state) and isinstance(again.first["w"], Blocks)
    _, loss = problem()
    gradient = jax.grad(loss)(params)
    assert same(optimizer.update(gradient, again, params), optimizer.update(gradient, state, params))


def test_it_composes_with_optax():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.MultiSteps(jq.adamw8bit(3e-3), 2))
    losses = trained(optimizer, 120)[2]
    assert losses[-1] < 0.7 * losses[0]


def test_a_vanishing_second_moment_does_not_blow_up():
    """One gradient 10^4 times the others of its block: they move by at most a few rates."""
    params = {"w": jnp.zeros((64, 64))}
    optimizer = jq.adamw8bit(1e-3, weight_decay=0.0)
    state = optimizer.init(params)
    gradient = {"w": jnp.full((64, 64), 1e-4).at[:, 0].set(1.0)}
    for _ in range(20):
        updates, state = optimizer.update(gradient, state, params)
        assert np.max(np.abs(updates["w"])) <= 2e-3


def test_states_can_be_donated():
    """No two parts of a state share a buffer."""
    optimizer, gradient = jq.adamw8bit(1e-3), {"w": jnp.ones((64, 64)), "b": jnp.ones(3)}
    step = jax.jit(lambda state, params: optimizer.update(gradient, state, params), donate_argnums=0)
    _, state = step(optimizer.init(gradient), gradient)
    assert int(step(state, gradient)[1].step) == 2


def test_an_update_without_parameters_is_an_error():
    optimizer, gradient = jq.adamw8bit(1e-3), {"w": jnp.ones((4, 4))}
    with pytest.raises(OptionError, match="give them"):
        optimizer.update(gradient, optimizer.init(gradient))
