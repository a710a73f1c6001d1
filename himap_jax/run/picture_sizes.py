"""The sizes of all prompts' pictures, from which the shapes of batches are chosen."""

import collections
import contextlib

import numpy as np

from himap_jax.engine import processes
from himap_jax.errors import UserError
from himap_jax.families.family import Processor
from himap_jax.inputs import ImageSize
from himap_jax.run.pictures import PictureFiles
from himap_jax.run.progress import Progress
from himap_jax.run.prompts import Prompts


def image_sizes(prompts: Prompts, files: PictureFiles, processor: Processor) -> collections.Counter[ImageSize]:
  """How many prompts have pictures of which size, the same in every process; without those that cannot be read."""
  found, is_fixed = np.zeros((len(prompts), 3), np.int32), processor.num_image_tokens is not None
  if processes.is_leader():
    with Progress(len(prompts), "prompt", "sizes of pictures") as progress:
      for number, prompt in enumerate(prompts):
        with contextlib.suppress(UserError):
          if prompt.error is None:
            sizes = [(1, 1) if is_fixed else files.size(image) for image in prompt.images]
            found[number] = (1, *processor.image_size(sizes))
        progress.update()
  found = processes.sum_over_processes(found)
  own, counts = np.unique(found[found[:, 0] > 0, 1:], axis=0, return_counts=True)
  return collections.Counter({ImageSize(*size): n for size, n in zip(own.tolist(), counts.tolist(), strict=True)})
