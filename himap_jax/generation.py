"""The library's `generate`: pictures and questions in, answers out."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from himap_jax.checkpoint import LoadedModel
from himap_jax.engine import sharding
from himap_jax.engine.batching import DEFAULT_BUCKETS, Batcher
from himap_jax.engine.engine import Engine, GenerationConfig
from himap_jax.pruning.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class InputConfig:
  """Preparation of prompts.

  Attributes:
    prompt_template: `chat` (the checkpoint's own), `vicuna_v1`, or a text with `<image>` and `{question}`.
    prompt_buckets: padded text lengths, in tokens.
  """

  prompt_template: str = "chat"
  prompt_buckets: tuple[int, ...] = DEFAULT_BUCKETS
  batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer.

  Attributes:
    text: without special tokens.
    token_ids: the generated tokens, including the end token.
    kept: for each stage the indices of the kept image tokens, ascending.
    first_logits: `[V]` float32 logits of the first generated token.
  """

  text: str
  token_ids: list[int]
  kept: list[list[int]]
  first_logits: Float[np.ndarray, "V"]


def generate(
  loaded: LoadedModel,
  images: Sequence[Image.Image | Sequence[Image.Image]],
  questions: Sequence[str],
  *,
  schedule: Schedule = Schedule(),
  generation: GenerationConfig = GenerationConfig(),
  inputs: InputConfig = InputConfig(),
) -> list[Answer]:
  """Answers questions about images, without pruning by default.

  Args:
    images: for each question its image, or its images in the order of `<image>` in the prompt.

  Raises:
    UserError: unusable settings or prompts.
  """
  processor = loaded.prompts(inputs.prompt_template)
  rows = [[own] if isinstance(own, Image.Image) else list(own) for own in images]
  lengths = {"buckets": inputs.prompt_buckets, "max_new_tokens": generation.max_new_tokens}
  batcher = Batcher(loaded.config, processor.image_shape, pictures={len(own) for own in rows} or {1}, **lengths)
  schedule.at(loaded.config.text.num_hidden_layers, batcher.most_image_tokens)
  engine = Engine(loaded.model, schedule, generation, eos_token_ids=loaded.eos_token_ids)
  batch_size = sharding.padded_batch_size(inputs.batch_size, sharding.mesh_of(loaded.model.params))
  examples = [processor.prepare(own, question) for own, question in zip(rows, questions, strict=True)]
  bucket_of = [batcher.bucket(example) for example in examples]
  answers: dict[int, Answer] = {}
  for bucket in sorted(set(bucket_of)):
    indices = [index for index, own in enumerate(bucket_of) if own == bucket]
    for group in (indices[first : first + batch_size] for first in range(0, len(indices), batch_size)):
      batch = batcher.pack([examples[index] for index in group], bucket=bucket, batch_size=batch_size)
      result = engine(batch, group)
      for place, index in enumerate(group):
        answers[index] = Answer(
          text=processor.decode(result.tokens[place]),
          token_ids=result.tokens[place],
          kept=[stage[place] for stage in result.kept],
          first_logits=result.logits[place],
        )
  return [answers[index] for index in range(len(examples))]
