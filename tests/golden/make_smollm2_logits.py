"""Records what llama.cpp says about SmolLM2, so that our own forward and tokenizer can be held against it.

    pip install xllamacpp
    PYTHONPATH=examples python tests/golden/make_smollm2_logits.py

It writes `smollm2.npz` beside itself: the tokens of one text, the next tokens that llama.cpp finds likeliest after some
prefixes of it, with their log-probabilities (the rest of the mass follows), and its tokenization of awkward strings.
llama.cpp rounds the inputs of its matmuls to 8 bits, so it agrees with exact arithmetic to a KL of about 0.004.
"""

import json
import urllib.request
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import xllamacpp
from llama_gguf import chat_prompt, fetch_smollm2

POSITIONS = tuple(range(7, 256, 10))
TOP = 512
TEXTS = (
    "def f(x: int) -> str:\n\treturn f'{x:>8}'  # aligned\n",
    "In 1984, 3.14159 was 22/7 and 0x1F was 31.",
    "   leading, trailing and  double spaces  \n\n\n\n  and newlines\r\n ",
    "I'll say it's what they've said; DON'T SHOUT.",
    "Grüße, café, naïve, Ελληνικά, 日本語, العربية, नमस्ते",
    "👩‍👩‍👧‍👦 🇩🇪 ½ ² ٣ — “quotes” …",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><file_sep>x",
    "a|im_start|>b <| im_end |>",
    chat_prompt("What is the capital of France?"),
)


class Server:
    """llama.cpp's HTTP server, in this process."""

    def __init__(self, model: Path):
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx = 1024
        params.n_parallel = 1
        self._server = xllamacpp.Server(params)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to one request."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, special tokens in it read as such and none added."""
        return self.post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def next_tokens(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        """The `TOP` likeliest tokens after a prompt, and their log-probabilities under the plain softmax."""
        answer = self.post("/completion", prompt=prompt, n_predict=1, n_probs=TOP, temperature=0, cache_prompt=False)
        (step,) = answer["completion_probabilities"]
        likeliest = step["top_logprobs"]
        return [entry["id"] for entry in likeliest], [entry["logprob"] for entry in likeliest]


def main() -> None:
    """Asks llama.cpp and writes the file."""
    server = Server(fetch_smollm2())
    text = chat_prompt("What does Python say about assignment?") + topics["assignment"]
    tokens = server.tokenize(text)[: POSITIONS[-1] + 1]
    ids, log_probs = zip(*(server.next_tokens(tokens[: position + 1]) for position in POSITIONS), strict=True)
    tokenized = {text: server.tokenize(text) for text in TEXTS}
    np.savez_compressed(
        Path(__file__).with_name("smollm2.npz"),
        tokens=np.array(tokens, np.int32),
        positions=np.array(POSITIONS, np.int32),
        ids=np.array(ids, np.uint16),
        log_probs=np.array(log_probs, np.float32),
        tokenized=np.array(json.dumps(tokenized)),
    )


if __name__ == "__main__":
    main()
