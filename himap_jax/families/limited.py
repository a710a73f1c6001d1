"""Refuses prompts that a model cannot hold, before they take memory or read embeddings that do not exist."""

import functools
from collections.abc import Sequence
from typing import Any

from PIL import Image

from himap_jax.errors import UserError
from himap_jax.families.family import Processor, Question, texts_of
from himap_jax.inputs import Example
from himap_jax.model.config import TextConfig


class LimitedProcessor:
  """A family's processor whose questions are shorter than the context, of tokens that have an embedding."""

  def __init__(self, processor: Processor, tokenizer: Any, text: TextConfig):
    self._processor, self._tokenizer = processor, tokenizer
    self._context, self._num_embeddings = text.max_position_embeddings, text.vocab_size + text.num_extra_embeddings

  def __getattr__(self, name: str) -> Any:
    if name == "_processor":  # of a copy that has no attributes yet
      raise AttributeError(name)
    return getattr(self._processor, name)

  def prepare(self, images: Sequence[Image.Image], question: Question) -> Example:
    """As `Processor.prepare`; `UserError` also for a question that no context holds, or a token without an embedding."""
    length = sum(map(len, texts_of(question)))
    if length > self._context and length > self._context * self._longest_token:
      raise UserError(f"the question has {length:,} characters, which no {self._context} tokens of context hold")
    example = self._processor.prepare(images, question)
    token = example.tokens[example.image_id < 0].max(initial=0)
    if token >= self._num_embeddings:
      raise UserError(
        f"the prompt has the token {token} ({self._tokenizer.convert_ids_to_tokens(int(token))}), but the model has "
        f"{self._num_embeddings} embeddings: its tokenizer is of another model"
      )
    return example

  @functools.cached_property
  def _longest_token(self) -> int:
    """Characters of the longest token."""
    return max(map(len, self._tokenizer.get_vocab()))
