"""The tokenizer whose vocabulary and merges a GGUF file carries: byte-level BPE."""

from collections.abc import Mapping
from typing import Any

from jaxquant.errors import FileError
from jaxquant.optional import optional

# How each `tokenizer.ggml.pre` cuts a text before any merging: regexes applied one after the other.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {"smollm": (r"\p{N}", _GPT2), "gpt-2": (_GPT2,), "llama-bpe": (_LLAMA3,)}
_SPECIAL = (3, 4)  # values of tokenizer.ggml.token_type: control, and defined by the user


def tokenizer_of(metadata: Mapping[str, Any]) -> Any:
    """Builds the tokenizer of a GGUF file.

    Args:
      metadata: of the file.

    Returns:
      A `tokenizers.Tokenizer`, which reads special tokens in a text as such and adds none of its own.

    Raises:
      FileError: the file has none, or one of a kind that is not built here.
      MissingPackageError: `tokenizers` is not installed.
    """
    tokenizers = optional("tokenizers", "pip install 'jaxquant[cli]'")
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _CUTS:
        raise FileError(
            f"the file's tokenizer is of the kind {kind!r} with the pre-tokenizer {pre!r}; what can be built is 'gpt2' "
            f"(byte-level BPE) with one of {', '.join(_CUTS)}. Choose a GGUF file with one of those."
        )
    tokens, types, pairs = (_field(metadata, name) for name in ("tokens", "token_type", "merges"))
    merges = [tuple(pair.split(" ")) for pair in pairs]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a piece that is itself a token as it is, even where no merges lead to it.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    cuts = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in _CUTS[pre]]
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [token for token, type in zip(tokens, types, strict=True) if type in _SPECIAL]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    return tokenizer


def _field(metadata: Mapping[str, Any], name: str) -> Any:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        raise FileError(f"the file has no field 'tokenizer.ggml.{name}', which its tokenizer needs.")
    return values
