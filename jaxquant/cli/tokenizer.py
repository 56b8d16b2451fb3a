"""The tokenizer whose vocabulary and merges a GGUF file carries: byte-level BPE."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.errors import FileError
from jaxquant.optional import optional

# How each `tokenizer.ggml.pre` cuts a text before any merging: regexes applied one after the other.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {"smollm": (r"\p{N}", _GPT2), "gpt-2": (_GPT2,), "llama-bpe": (_LLAMA3,)}
_PREFIX = "tokenizer.ggml."
_SPECIAL = (3, 4)  # values of tokenizer.ggml.token_type: control, and defined by the user


def tokenizer_of(metadata: Mapping[str, Any], file: str = "the file") -> Any:
    """Builds the tokenizer of a GGUF file.

    Args:
      metadata: of the file.
      file: what an error calls it.

    Returns:
      A `tokenizers.Tokenizer`, which reads special tokens in a text as such and adds none of its own.

    Raises:
      FileError: the file has none, or one of a kind that is not built here, or a broken one.
      MissingPackageError: `tokenizers` is not installed.
    """
    tokenizers = optional("tokenizers", "pip install 'jaxquant[cli]'")
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or not isinstance(pre, str) or pre not in _CUTS:
        raise FileError(
            f"{file}: its tokenizer is of the kind {kind!r:.60} with the pre-tokenizer {pre!r:.60}; what can be built "
            f"is 'gpt2' (byte-level BPE) with one of {', '.join(_CUTS)}. Choose a GGUF file with one of those."
        )
    tokens, pairs = _texts(metadata, "tokens", file), _texts(metadata, "merges", file)
    special = [
        token for token, type in zip(tokens, _types(metadata, len(tokens), file), strict=True) if type in _SPECIAL
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [_merge(pair, vocabulary, file) for pair in pairs]
    # Llama 3 takes a piece that is itself a token as it is, even where no merges lead to it.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    cuts = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in _CUTS[pre]]
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    return tokenizer


def _texts(metadata: Mapping[str, Any], name: str, file: str) -> list[str]:
    values = metadata.get(_PREFIX + name)
    if not isinstance(values, list):  # a list of the header's is one of texts
        raise _error(file, name, f"{values!r:.60}, not a list of texts")
    return values


def _types(metadata: Mapping[str, Any], count: int, file: str) -> list[int]:
    value = metadata.get(_PREFIX + "token_type")
    types = np.asarray(value)
    if types.shape != (count,) or not np.issubdtype(types.dtype, np.integer):
        raise _error(file, "token_type", f"{value!r:.60}, not {count} whole numbers, one for each token")
    return types.tolist()


def _merge(pair: str, vocabulary: Mapping[str, int], file: str) -> tuple[str, str]:
    left, _, right = pair.partition(" ")
    if not {left, right, left + right} <= vocabulary.keys():
        raise _error(file, "merges", f"a list with {pair!r:.60}, which does not merge two tokens to a third")
    return left, right


def _error(file: str, name: str, what: str) -> FileError:
    return FileError(f"{file}: its field '{_PREFIX}{name}' is {what}. Convert the model anew.")
