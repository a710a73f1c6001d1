"""Tokenizers from `*.tiktoken` files: one token, in base64, and its rank per line."""

import base64
import pathlib
from collections.abc import Sequence
from typing import Any

from himap_jax.errors import UserError

# The pieces of a text in which tokens are found, of Qwen.
PIECES = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
  r"\s+(?!\S)|\s+"
)


def read_ranks(path: pathlib.Path, count: int) -> dict[bytes, int]:
  """The tokens of a tiktoken file in the order of their ranks; raises `UserError` unless there are `count`."""
  try:
    pairs = [line.split() for line in path.read_bytes().splitlines() if line]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror})") from error
  except ValueError as error:
    raise UserError(f"{path}: not a complete tiktoken file ({error}); download it again") from error
  if list(ranks.values()) != list(range(count)):
    raise UserError(
      f"{path}: not the complete vocabulary: config.json needs {count} tokens of ranks 0 to {count - 1}, but it has "
      f"{len(ranks)}; download it again"
    )
  return ranks


def bpe(ranks: dict[bytes, int], special_tokens: Sequence[str]) -> Any:
  """A tokenizer of the `tokenizers` library with these tokens, and special ones after them.

  A token is the merge of every pair of tokens that it consists of.
  """
  import tokenizers
  from transformers.convert_slow_tokenizer import bytes_to_unicode

  letters = bytes_to_unicode()
  text = {token: "".join(letters[byte] for byte in token) for token in ranks}
  merges = []
  for token in ranks:
    pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
    known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    merges += [(text[left], text[right]) for left, right in known]
  vocabulary = {text[token]: rank for token, rank in ranks.items()}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
  tokenizer.normalizer = tokenizers.normalizers.NFC()
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated"),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  special = [tokenizers.AddedToken(token, special=True, normalized=False) for token in special_tokens]
  tokenizer.add_special_tokens(special)
  return tokenizer
