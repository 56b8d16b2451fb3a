"""The example Llama: its forward and tokenizer against llama.cpp's, its cache, its loader, and what int8 costs it."""

import dataclasses
import functools
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import llama_gguf
import numpy as np
import pytest
import smollm2
from generation import generate, generate_step
from llama import QUERY_BLOCK, KVCache, Llama, LlamaConfig, fused
from models import jitted_as_shipped

import jaxquant as jq

GOLDEN = Path(__file__).parent / "golden" / "smollm2.npz"
TINY = LlamaConfig(vocab=48, width=32, hidden=64, layers=2, heads=4, kv_heads=2, head_width=8)
UNTIED = LlamaConfig(**{**vars(TINY), "tied": False, "rope_factors": (1.0, 1.0, 2.0, 8.0)})


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def path():
    return llama_gguf.fetch_smollm2()


@pytest.fixture(scope="module")
def model(path):
    return llama_gguf.load_llama(path)


@pytest.fixture(scope="module")
def tokenizer(path):
    return llama_gguf.load_tokenizer(path)


@pytest.fixture(scope="module")
def windows(tokenizer):
    return smollm2.text_windows(tokenizer, smollm2.held_out_text(), 8)


@pytest.fixture(scope="module")
def forward(model):
    return jitted_as_shipped(Llama(model[0]).apply)


def perplexity(forward, params, windows) -> float:
    losses = []
    for window in windows:
        logits, _ = forward(params, window[None])
        losses.append(float(smollm2.compare(logits, logits, window[None])[0]))
    return float(np.exp(np.mean(losses)))


def random_tokens(config: LlamaConfig, *shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), shape, 0, config.vocab)


@functools.cache
def jitted(config: LlamaConfig):
    """The forward of a small Llama, compiled once for each shape of tokens and cache."""
    return jax.jit(Llama(config).apply)


@functools.cache
def init(config: LlamaConfig):
    return jax.jit(Llama(config).init)(jax.random.key(0), random_tokens(config, 1, 2))


@pytest.mark.model
def test_tokenizer_is_llama_cpps(golden, tokenizer):
    for text, expected in json.loads(str(golden["tokenized"])).items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=False) == text


@pytest.mark.model
def test_logits_are_llama_cpps(golden, model, forward):
    logits, _ = forward(model[1], jnp.asarray(golden["tokens"])[None])
    ours = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)[golden["positions"]]
    ours = np.take_along_axis(ours, golden["ids"].astype(int), axis=1)
    theirs = golden["log_probs"].astype(np.float64)
    ours_rest, theirs_rest = (np.maximum(1 - np.exp(p).sum(1), 1e-6) for p in (ours, theirs))
    kl = np.sum(np.exp(theirs) * (theirs - ours), axis=1) + theirs_rest * np.log(theirs_rest / ours_rest)
    assert kl.mean() < 0.01
    assert kl.max() < 0.03


@pytest.fixture(scope="module")
def int8_from_float(model, forward, windows):
    """Both models on the same windows, each run once."""
    config, params = model
    int8 = jitted_as_shipped(jq.quantized(Llama(config).apply, **smollm2.ARITHMETIC))
    qparams, batches = jq.quantize_params(params, jq.int8), [window[None] for window in windows]
    return jq.divergence(lambda t: forward(params, t)[0], lambda t: int8(qparams, t)[0], batches)


@pytest.mark.model
def test_float_perplexity(int8_from_float):
    """On the documentation of this Python, whose releases differ by a few hundredths."""
    assert int8_from_float.reference_perplexity == pytest.approx(14.69, abs=0.15)


@pytest.mark.model
def test_cached_decoding_of_the_model_is_its_forward(golden, model, forward):
    config, params = model
    tokens = jnp.asarray(golden["tokens"][:48])[None]
    whole, _ = forward(params, tokens)
    logits, cache = forward(params, tokens[:, :40], KVCache.empty(config, 1, 64))
    np.testing.assert_allclose(logits[0, -1], whole[0, 39], atol=1e-3)
    for index in range(40, 48):
        logits, cache = forward(params, tokens[:, index : index + 1], cache)
        np.testing.assert_allclose(logits[0, 0], whole[0, index], atol=1e-3)


@pytest.mark.model
def test_int8_perplexity_is_within_one_percent_of_float(int8_from_float):
    """As far as 8 windows tell: which codes a tie rounds to is the processor's, and moves the loss by its interval."""
    found = int8_from_float
    assert found.loss_gap - found.loss_gap_error <= np.log(1.01) and found.kl < 0.015, found


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_decoding_with_a_cache_in_codes_is_nearly_the_forward(name):
    """Logits, a prompt and then token by token, within what rounding keys and values costs; and a smaller cache."""
    wide = dataclasses.replace(TINY, head_width=16)
    params, apply, tokens = init(wide), jitted(wide), random_tokens(wide, 2, 12)
    whole, _ = apply(params, tokens)
    cache = KVCache.empty(wide, 2, 16, smollm2.CACHES[name])
    logits, cache = apply(params, tokens[:, :7], cache)
    pieces = [logits]
    for index in range(7, 12):
        logits, cache = apply(params, tokens[:, index : index + 1], cache)
        pieces.append(logits)
    off = jnp.linalg.norm(jnp.concatenate(pieces, axis=1) - whole) / jnp.linalg.norm(whole)
    # An int4 token's numbers are rounded by 1/15 of their range over sqrt(12), 8 % of their spread, twice a layer.
    assert 0 < off < {"int8": 0.01, "int4": 0.2}[name]


@pytest.mark.model
@pytest.mark.example
def test_an_int8_cache_costs_a_five_hundredth_of_perplexity(model, windows, forward):
    """On SmolLM2 with float weights: perplexity through an int8 cache within 1.002 of that without one."""
    config, params = model
    cache = KVCache.empty(config, 1, 512, smollm2.CACHES["int8"])
    cached = jitted_as_shipped(lambda params, tokens: Llama(config).apply(params, tokens, cache))
    some = windows[:4]
    assert perplexity(cached, params, some) < 1.002 * perplexity(forward, params, some)


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_cached_decoding_is_the_forward(config):
    params, apply, tokens = init(config), jitted(config), random_tokens(config, 2, 12)
    whole, none = apply(params, tokens)
    first, cache = apply(params, tokens[:, :7], KVCache.empty(config, 2, 16))
    rest = []
    for index in range(7, 12):
        logits, cache = apply(params, tokens[:, index : index + 1], cache)
        rest.append(logits)
    assert none is None
    assert int(cache.position) == 12
    np.testing.assert_allclose(jnp.concatenate([first, *rest], axis=1), whole, atol=1e-5)


def test_a_prompt_longer_than_is_read_at_once_is_the_forward():
    """Of a text that nothing came before, in blocks, of one that something did, and with no cache."""
    params, apply, tokens = init(TINY), jitted(TINY), random_tokens(TINY, 1, 2 * QUERY_BLOCK + 40)
    whole, _ = apply(params, tokens)
    one_by_one = [
        apply(params, tokens[:, : index + 1])[0][:, -1] for index in (QUERY_BLOCK - 1, QUERY_BLOCK, 2 * QUERY_BLOCK)
    ]
    np.testing.assert_allclose(
        whole[:, [QUERY_BLOCK - 1, QUERY_BLOCK, 2 * QUERY_BLOCK]], jnp.stack(one_by_one, axis=1), atol=1e-5
    )
    for cut in (1, QUERY_BLOCK + 20):
        first, cache = apply(params, tokens[:, :cut], KVCache.empty(TINY, 1, tokens.shape[1]))
        rest, _ = apply(params, tokens[:, cut:], cache)
        np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), whole, atol=1e-5)


def test_later_tokens_do_not_change_earlier_logits():
    params, apply, tokens = init(TINY), jitted(TINY), random_tokens(TINY, 1, 8)
    changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % TINY.vocab)
    before, after = apply(params, tokens)[0], apply(params, changed)[0]
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])


def test_generate_step_is_greedy_or_samples():
    params, apply, tokens = init(TINY), jitted(TINY), random_tokens(TINY, 1, 4)
    cache = KVCache.empty(TINY, 1, 8)
    chosen, after = generate_step(apply, params, tokens, cache)
    last, _ = Llama(TINY, last=True).apply(params, tokens, cache)
    assert last.shape[1] == 1 and jnp.allclose(last, apply(params, tokens, cache)[0][:, -1:], atol=1e-5)
    assert chosen[0, 0] == apply(params, tokens)[0][0, -1].argmax()
    assert int(after.position) == 4
    cold, _ = generate_step(apply, params, tokens, cache, temperature=1e-4, key=jax.random.key(2))
    assert cold == chosen


def test_tokens_generated_on_the_device_are_those_of_single_steps():
    params, apply, prompt = init(TINY), jitted(TINY), random_tokens(TINY, 2, 4)
    keys = jax.random.split(jax.random.key(0), 3)
    for temperature, key in ((0.0, None), (1.0, keys)):
        first = generate_step(apply, params, prompt, KVCache.empty(TINY, 2, 8))
        tokens, cache = generate(apply, params, *first, 3, temperature, key)
        state, singly = first, []
        for step in range(3):
            state = generate_step(apply, params, *state, temperature, None if key is None else key[step])
            singly.append(state[0])
        np.testing.assert_array_equal(tokens, jnp.concatenate(singly, axis=1))
        assert int(cache.position) == 7


@pytest.mark.parametrize("quantize", [lambda params: params, jq.quantize_params], ids=["float", "int8"])
def test_matrices_side_by_side_are_the_same_model(quantize):
    """A scale for each output does not know what lies beside it."""
    config, params = fused(TINY, init(TINY))
    tokens = random_tokens(TINY, 2, 6)
    apart, together = (
        jq.quantized(Llama(c).apply)(quantize(p), tokens)[0] for c, p in ((TINY, init(TINY)), (config, params))
    )
    np.testing.assert_allclose(together, apart, atol=1e-5)


def test_quantized_cached_decoding_is_the_quantized_forward():
    tokens = random_tokens(TINY, 1, 6)
    params = jq.quantize_params(init(TINY), jq.int8)
    apply = jax.jit(jq.quantized(Llama(TINY).apply))
    whole, _ = apply(params, tokens)
    _, cache = apply(params, tokens[:, :5], KVCache.empty(TINY, 1, 8))
    last, _ = apply(params, tokens[:, 5:], cache)
    np.testing.assert_allclose(last[:, 0], whole[:, -1], atol=1e-4)


def write_gguf(path: Path, config: LlamaConfig, params, architecture="llama", pre="smollm", extra=()) -> None:
    """Writes a small Llama as llama.cpp's converter would, its matrices [out, in]."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.layers)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|im_end|>", "a", "b", "1", "2", "Ġ", "ab", "Ġab"])
    writer.add_token_types([3, 1, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "Ġ ab"])
    names = {place: name for name, place in llama_gguf.TOP.items()}
    blocks = {place: name for name, place in llama_gguf.BLOCK.items()}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params["params"]):
        place = tuple(key.key for key in keys)
        inside = place[0].startswith("block_")
        name = f"blk.{place[0][6:]}.{blocks[place[1:]]}" if inside else names[place]
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(leaf.T if place[-1] == "kernel" else leaf))
    if config.rope_factors is not None:
        writer.add_tensor(llama_gguf.ROPE_FACTORS, np.array(config.rope_factors, np.float32))
    for name in extra:
        writer.add_tensor(name, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_gguf_round_trip(tmp_path, config):
    params = init(config)
    write_gguf(tmp_path / "tiny.gguf", config, params)
    found, loaded = llama_gguf.load_llama(tmp_path / "tiny.gguf")
    assert found == LlamaConfig(**{**vars(config), "norm_eps": found.norm_eps})
    assert found.norm_eps == pytest.approx(config.norm_eps)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))


def test_gguf_tokenizer(tmp_path):
    params = init(TINY)
    write_gguf(tmp_path / "tiny.gguf", TINY, params)
    tokenizer = llama_gguf.load_tokenizer(tmp_path / "tiny.gguf")
    assert tokenizer.encode("ab ab12<|im_end|>").ids == [6, 7, 3, 4, 0]
    assert "".join(llama_gguf.stream(tokenizer, iter([6, 7, 3, 0]))) == "ab ab1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gpt2"}, "'gpt2'"),
        ({"extra": ["blk.0.attn_q.bias"]}, "attn_q.bias"),
        ({"pre": "klingon"}, "'klingon'"),
    ],
)
def test_gguf_errors_name_the_cause(tmp_path, options, message):
    params = init(TINY)
    write_gguf(tmp_path / "tiny.gguf", TINY, params, **options)
    with pytest.raises(llama_gguf.InputError, match=message):
        llama_gguf.load_llama(tmp_path / "tiny.gguf")
        llama_gguf.load_tokenizer(tmp_path / "tiny.gguf")


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "noise.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(llama_gguf.InputError, match="not a readable GGUF"):
        llama_gguf.load_llama(tmp_path / "noise.gguf")


def test_command_line():
    assert smollm2.parse([]).formats == list(smollm2.FORMATS)
    assert smollm2.parse(["--formats", "int8,nf4"]).formats == ["float32", "int8", "nf4"]
    with pytest.raises(SystemExit):
        smollm2.parse(["--formats", "int9"])
