"""The cache of keys and values in codes: what it stores, and that attention over it is attention over what it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import normal
from tables import same

import jaxquant as jq
from jaxquant import cache as cache_module
from jaxquant.errors import FormatError, ShapeError

FORMATS = {
    "int8": jq.int8,
    "int8-affine": jq.int8(symmetric=False),
    "int4": jq.int4,
    "int4-affine": jq.int4(symmetric=False),
    "int4-group": jq.int4(group=8, symmetric=False),
    "int3-affine": jq.int3(symmetric=False),
    "int2-group": jq.int2(group=8, symmetric=False),
}
BATCH, LENGTH, HEADS, SHARED, WIDTH = 2, 12, 3, 2, 16

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def filled(format, time=8, start=0, length=LENGTH):
    """A cache with some random tokens in it, and those tokens."""
    keys, values = normal(BATCH, time, HEADS, WIDTH, seed=1), 3 * normal(BATCH, time, HEADS, WIDTH, seed=2)
    cache = jq.KVCache.empty(BATCH, length, HEADS, WIDTH, format)
    return jax.jit(jq.KVCache.append)(cache, keys, values, start), keys, values


def attention(queries, keys, values, position):
    """Grouped-query attention in float64, query by query."""
    queries, keys, values = (np.asarray(a, np.float64) for a in (queries, keys, values))
    out = np.zeros(queries.shape)
    for b, t, h in np.ndindex(*queries.shape[:3]):
        seen = position + t + 1
        scores = keys[b, :seen, h // SHARED] @ queries[b, t, h] / np.sqrt(queries.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ values[b, :seen, h // SHARED]
    return out


@every_format
def test_what_is_appended_is_what_can_be_read(format):
    """Law: each number is within half a step of its (shifted, rotated) token, and other places are as they were."""
    cache, keys, values = filled(format, time=5, start=3)
    read, read_values = cache.read()
    if format.symmetric:
        assert same(jax.tree.map(lambda part: part[:, 3:8], cache.values), jq.quantize(values, format, axis=-1))
    # Half a step, and as much of one as a zero point is rounded by, if there is any.
    most = 0.5 + (0 if format.symmetric else 2.0 ** (format.bits - 9)) + 1e-4
    step = np.repeat(cache.values.scale, WIDTH // cache.values.scale.shape[-1], axis=-1)[:, 3:8]
    assert np.all(np.abs(read_values[:, 3:8] - values) <= most * step)
    # A rotation keeps lengths, so half a step in each rotated number is at most that times the root of the width.
    worst = 0.51 * np.max(np.asarray(cache.keys.scale)[:, 3:8], axis=-1, keepdims=True) * np.sqrt(WIDTH)
    assert np.all(np.linalg.norm(read[:, 3:8] - keys, axis=-1, keepdims=True) <= worst)
    rest = [np.delete(np.asarray(part), range(3, 8), axis=1) for part in cache.read()]
    assert np.all(rest[0] == 0) and np.all(rest[1] == 0)


@every_format
def test_token_by_token_is_all_at_once(format):
    """Law: after a prompt, tokens one by one or together leave the same cache: the first ones alone set the shift."""
    prompt, keys, values = filled(format, time=3)
    together = jax.jit(jq.KVCache.append)(prompt, keys, values, 3)

    def one(cache, token):
        k, v, i = token
        return cache.append(k[:, None], v[:, None], i), None

    moved = (jnp.moveaxis(keys, 1, 0), jnp.moveaxis(values, 1, 0), 3 + jnp.arange(3))
    assert same(jax.lax.scan(one, prompt, moved)[0], together)


def test_what_all_keys_share_costs_nothing():
    """Law: a constant added to all keys changes no attention, and here no code either, however large it is."""
    format = jq.int4(symmetric=False)
    cache, keys, values = filled(format)
    moved = jq.KVCache.empty(BATCH, LENGTH, HEADS, WIDTH, format).append(keys + 64.0, values, 0)
    queries = normal(BATCH, 1, HEADS * SHARED, WIDTH, seed=5)
    np.testing.assert_allclose(moved.attend(queries, 7), cache.attend(queries, 7), atol=0.02)


@every_format
@pytest.mark.parametrize("time, position", [(1, 7), (3, 5), (8, 0)])
def test_attention_over_codes_is_attention_over_what_they_stand_for(format, time, position):
    """Law: attend(q) == softmax(q read_k^T) read_v in float64, causal, with shared heads."""
    cache, _, _ = filled(format)
    queries = normal(BATCH, time, HEADS * SHARED, WIDTH, seed=5)
    found = jax.jit(jq.KVCache.attend)(cache, queries, position)
    np.testing.assert_allclose(found, attention(queries, *cache.read(), position), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("format", [jq.int8, jq.int4(group=8, symmetric=False)], ids=["int8", "int4-group"])
@pytest.mark.parametrize("blocks, more, position", [(1, 0, 0), (1, 1, 0), (2, 5, 0), (2, 5, 3)])
def test_a_long_prompt_sees_what_each_of_its_tokens_may(format, blocks, more, position):
    """The same law for as many queries as are taken at once, and more, whether anything came before them or not."""
    time = blocks * cache_module._QUERY_BLOCK + more
    cache, _, _ = filled(format, time + position, length=time + 8)
    queries = normal(BATCH, time, HEADS * SHARED, WIDTH, seed=5)
    found = jax.jit(jq.KVCache.attend)(cache, queries, position)
    np.testing.assert_allclose(found, attention(queries, *cache.read(), position), rtol=2e-5, atol=2e-5)


def test_texts_of_a_batch_may_be_at_places_of_their_own():
    """Law: `vmap` over caches and positions is attention of one after the other, at the beginning and later."""
    cache, _, _ = filled(jq.int8, LENGTH)
    queries, positions = normal(2, 1, 3, HEADS * SHARED, WIDTH, seed=5), jnp.asarray([0, 6])
    found = jax.vmap(lambda q, p: jax.tree.map(lambda part: part[:1], cache).attend(q, p))(queries, positions)
    for one, q, position in zip(found, queries, positions, strict=True):
        np.testing.assert_allclose(
            one, attention(q, *(part[:1] for part in cache.read()), int(position)), rtol=2e-5, atol=2e-5
        )


@every_format
def test_no_tokens_change_nothing(format):
    """Law: none appended leave the cache as it was, at its beginning too, and of none asked none come back."""
    cache, keys, values = filled(format)
    for position in (0, 8):
        assert same(jax.jit(jq.KVCache.append)(cache, keys[:, :0], values[:, :0], position), cache)
        queries = jnp.zeros((BATCH, 0, HEADS * SHARED, WIDTH))
        assert jax.jit(jq.KVCache.attend)(cache, queries, position).shape == queries.shape


@every_format
def test_a_cache_that_is_used_again_is_a_new_one(format):
    """Law: a second text, from position 0, sees nothing of a longer one before it, not even the mean of its keys."""
    caches = filled(format, LENGTH)[0], jq.KVCache.empty(BATCH, LENGTH, HEADS, WIDTH, format)
    keys, values = normal(BATCH, 3, HEADS, WIDTH, seed=6) + 2, normal(BATCH, 3, HEADS, WIDTH, seed=7)
    queries = normal(BATCH, 3, HEADS * SHARED, WIDTH, seed=8)
    again, new = (cache.append(keys, values, 0) for cache in caches)
    assert same(again.attend(queries, 0), new.attend(queries, 0))
    assert same(again.attend(queries[:, 2:], 2), new.attend(queries[:, 2:], 2))


@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0], ids=["below zero", "both", "above zero"])
@pytest.mark.parametrize("format", [jq.int8(symmetric=False), jq.int4(symmetric=False), jq.int2(symmetric=False)])
def test_zero_points_of_any_range_have_room_in_a_byte(format, shift):
    values = normal(BATCH, 4, HEADS, WIDTH, seed=2) + shift
    cache = jq.KVCache.empty(BATCH, 4, HEADS, WIDTH, format).append(values, values, 0)
    step = np.asarray(cache.values.scale)
    assert np.all(np.abs(cache.read()[1] - values) <= (0.5 + 2.0 ** (format.bits - 9) + 1e-3) * step)


# Each shape compiles anew.
SHAPES = [(1, 1, 2), (2, 3, 8), (5, 2, 10), (9, 1, 10), (7, 3, 2)]


@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_any_shape(shape, seed):
    """Keys and values of any shape come back within 1 % of their length, also where a head is no power of two wide."""
    length, heads, width = shape
    keys, values = normal(1, length, heads, width, seed=seed), normal(1, length, heads, width, seed=seed + 10)
    cache = jq.KVCache.empty(1, length, heads, width).append(keys, values, 0)
    spread = np.linalg.norm(keys - cache.shift, axis=-1)
    off = [np.linalg.norm(read - x, axis=-1) for x, read in zip((keys, values), cache.read(), strict=True)]
    assert np.all(off[0] <= 0.01 * np.sqrt(width) * spread + 1e-6)
    assert np.all(off[1] <= 0.01 * np.sqrt(width) * np.linalg.norm(values, axis=-1))


def test_an_affine_cache_of_few_bits_is_nearer_than_rounding_with_whole_zero_points():
    """Law: over many tokens, as a zero point has a byte here and four bits there."""
    format, values = jq.int4(group=8, symmetric=False), normal(1, 64, HEADS, WIDTH, seed=2)
    cache = jq.KVCache.empty(1, 64, HEADS, WIDTH, format).append(values, values, 0)
    whole = jq.dequantize(jq.quantize(values, format, axis=-1))
    assert np.mean((cache.read()[1] - values) ** 2) < 0.95 * np.mean((whole - values) ** 2)


def test_bytes_and_dtypes():
    """Codes are packed: a quarter and an eighth of float32, and a scale for each token and head."""
    numbers, shift = 2 * BATCH * LENGTH * HEADS * WIDTH, 4 * BATCH * HEADS * WIDTH
    sizes = {name: jq.KVCache.empty(BATCH, LENGTH, HEADS, WIDTH, format).nbytes for name, format in FORMATS.items()}
    assert sizes["int8"] == numbers + numbers // WIDTH * 4 + shift
    assert sizes["int4"] == numbers // 2 + numbers // WIDTH * 4 + shift
    bf16 = jq.KVCache.empty(1, 4, 1, 8, dtype=jnp.bfloat16)
    assert all(part.dtype == jnp.bfloat16 for part in bf16.read())
    queries = normal(1, 1, 1, 8).astype(jnp.bfloat16)
    assert bf16.append(queries, queries, 0).attend(queries, 0).dtype == jnp.bfloat16


@every_format
def test_a_donated_cache_is_updated_in_place(format):
    step = jax.jit(jq.KVCache.append, donate_argnums=0)
    cache, keys, values = filled(format)
    old = cache.held_keys.held
    cache = step(cache, keys[:, :1], values[:, :1], 8)
    assert old.is_deleted()
    compiled = step.lower(cache, keys[:, :1], values[:, :1], 8).compile().memory_analysis()
    assert compiled.alias_size_in_bytes > 0.9 * compiled.output_size_in_bytes - 1024


@pytest.mark.parametrize("format", [jq.fp8, jq.nf4, jq.int8(per_channel=False)])
def test_other_formats_are_errors(format):
    with pytest.raises(FormatError, match="scale per token and head"):
        jq.KVCache.empty(1, 4, 1, 16, format)


@pytest.mark.parametrize("width, group", [(15, None), (15, 5), (16, 1)])
def test_codes_that_would_share_a_byte_with_another_group_are_errors(width, group):
    with pytest.raises(ShapeError, match="multiple of 2"):
        jq.KVCache.empty(1, 4, 1, width, jq.int4(group=group))


def test_a_cache_is_no_weight():
    """An argument of a quantized function as any other: its codes are left to the function."""
    cache, _, _ = filled(jq.int8)

    def step(params, cache, x):
        keys = (x @ params).reshape(BATCH, 1, HEADS, WIDTH)
        cache = cache.append(keys, keys, 8)
        return cache.attend(jnp.tile(keys, (1, 1, SHARED, 1)), 8), cache

    params, x = normal(32, HEADS * WIDTH), normal(BATCH, 1, 32, seed=1)
    q = jq.quantize(params, jq.int8)
    mixed, grown = jax.jit(jq.quantized(step, activations=None))(q, cache, x)
    expected, same_cache = jax.jit(step)(jq.dequantize(q), cache, x)
    np.testing.assert_allclose(mixed, expected, atol=0.02)
    assert jax.tree.structure(grown) == jax.tree.structure(same_cache) == jax.tree.structure(cache)
