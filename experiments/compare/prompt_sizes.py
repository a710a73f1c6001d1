"""What the costs of a prompt depend on."""

import contextlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.shared.subject import Subject
from himap_jax.engine.accounting import model_sizes
from himap_jax.errors import UserError
from himap_jax.pruning.cost import Costs, costs
from himap_jax.pruning.schedule import Schedule
from himap_jax.pruning.sizes import ModelSizes


class PromptSizes(NamedTuple):
  """What the costs of a prompt depend on: the model, its tokens before pruning, bytes of a cached value, and tiles."""

  model: ModelSizes
  num_image_tokens: int
  num_text_tokens: int
  bytes_per_value: int = 2
  num_tiles: int = 1

  def costs(self, schedule: Schedule) -> Costs:
    return costs(self.model, schedule, *self[1:4], num_pictures=self.num_tiles)


def prompt_sizes(subject: Subject, bytes_per_value: int) -> PromptSizes:
  """What the costs of the questions depend on."""
  sizes = model_sizes(subject.opened.config, subject.processor.image_shape)
  num_tiles = subject.processor.image_size([(1, 1)]).num_tiles  # the same for pictures of all sizes
  return PromptSizes(sizes, subject.processor.num_image_tokens, mean_text_length(subject), bytes_per_value, num_tiles)


def mean_text_length(subject: Subject) -> int:
  """The mean number of text tokens of the questions that the model can take, whatever their pictures."""
  blank, lengths = Image.new("RGB", (64, 64)), {}
  for text in {question.question for question in subject.questions}:
    with contextlib.suppress(UserError):
      example = subject.processor.prepare([blank], text)
      subject.batcher.bucket(example)
      lengths[text] = example.num_text_tokens
  return round(float(np.mean([lengths[q.question] for q in subject.questions if q.question in lengths])))
