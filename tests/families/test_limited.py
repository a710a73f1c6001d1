"""Prompts that a model cannot hold are refused, whatever its family."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from himap_jax import UserError
from himap_jax.families.family import Message
from himap_jax.families.limited import LimitedProcessor

PICTURE = Image.new("RGB", (30, 20))


@pytest.fixture
def model(loaded):
  return loaded("clip_mha")


def test_questions_that_no_context_holds_are_not_tokenised(model, monkeypatch):
  longest = max(map(len, model.processor.tokenizer.get_vocab()))
  processor, most = model.prompts(), model.config.text.max_position_embeddings * longest
  monkeypatch.setattr(processor._processor, "prepare", lambda images, question: pytest.fail("tokenised"))
  for question in ("a" * (most + 1), [Message("system", "a" * most), Message("user", "a")]):
    with pytest.raises(
      UserError, match=f"the question has {most + 1:,} characters, which no .* tokens of context hold"
    ):
      processor.prepare([PICTURE], question)
  monkeypatch.undo()
  assert processor.prepare([PICTURE], "a" * (most // longest)).num_text_tokens > 0


def test_tokens_without_an_embedding(model, monkeypatch):
  """Those of image tokens, which are replaced, may have none."""
  plain, text = model.prompts()._processor, model.config.text
  example = plain.prepare([PICTURE], "Why?")
  most = example.tokens[example.image_id < 0].max()
  fits, lacks = (dataclasses.replace(text, vocab_size=int(size)) for size in (most + 1, most))
  large = dataclasses.replace(example, tokens=np.where(example.image_id >= 0, 999, example.tokens).astype(np.int32))
  monkeypatch.setattr(plain, "prepare", lambda images, question: large)
  assert LimitedProcessor(plain, model.processor.tokenizer, fits).prepare([PICTURE], "Why?").num_text_tokens
  with pytest.raises(UserError, match=f"the prompt has the token {most} .*, but the model has {most} embeddings"):
    LimitedProcessor(plain, model.processor.tokenizer, lacks).prepare([PICTURE], "Why?")
  extra = dataclasses.replace(lacks, num_extra_embeddings=1)
  assert LimitedProcessor(plain, model.processor.tokenizer, extra).prepare([PICTURE], "Why?").num_text_tokens
