"""Times a decoding step of rows on `himap_adaptive`'s rungs: in one pool padded to the largest rung, or in a pool for each.

    python -m experiments.speed.rungs --slots=16

A pool for each rung has shorter caches, but each has a third of the rows and reads all weights.
"""

import statistics
from collections.abc import Callable

from absl import flags
from PIL import Image

import himap_jax
from himap_jax import checkpoint
from himap_jax.checkpoint import LoadedModel
from himap_jax.engine.batching import Batcher, ImageBucket
from himap_jax.engine.capacity import BatchSizes
from himap_jax.engine.engine import Batch, GenerationConfig
from himap_jax.engine.pool import Request
from himap_jax.pruning.methods import METHODS
from himap_jax.pruning.methods.himap_adaptive import RUNGS
from himap_jax.run import command

METHOD = METHODS["himap_adaptive"]
PICTURE, QUESTION = "experiments/demo/red-triangle.png", "what is the red shape?"


def define_flags() -> None:
  flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
  flags.DEFINE_enum("dtype", "bfloat16", sorted(checkpoint.DTYPES), "As in himap_jax.run.")
  flags.DEFINE_integer("slots", 16, "Rows that are decoded together.", lower_bound=len(RUNGS[0]))
  flags.DEFINE_integer("max_new_tokens", 64, "Tokens of every answer.", lower_bound=2)
  flags.DEFINE_integer("turns", 5, "Turns of every pool.", lower_bound=1)


def steps(
  loaded: LoadedModel, picture: Image.Image, num_new: int, prune_layers: tuple[int, ...] = METHOD.prune_layers
) -> Callable[[int, int], Callable[[], float]]:
  """Returns `make(rung, slots)`: a function that fills a pool once and gives the seconds of its steps on average."""
  processor = loaded.prompts()
  example = processor.prepare([picture], QUESTION)
  length = -(-example.num_text_tokens // 64) * 64
  batcher = Batcher(
    loaded.config.text.max_position_embeddings, processor.blank, [ImageBucket(*example.size)], buckets=(length,)
  )
  packed = batcher.pack([example], bucket=batcher.bucket(example), batch_size=1)

  def make(rung: int, slots: int) -> Callable[[], float]:
    keep = tuple(share * of_stage[rung] for share, of_stage in zip(METHOD.keep, RUNGS, strict=True))
    schedule = loaded.schedule("himap", prune_layers, keep)
    engine = loaded.engine(schedule, GenerationConfig(num_new, ignore_eos=True), BatchSizes(slots, 1))

    def step() -> float:
      before = engine.usage.decode_seconds, engine.usage.slot_steps
      for _ in engine.answer(Batch(packed, [Request(number)]) for number in range(slots)):
        pass
      return (engine.usage.decode_seconds - before[0]) * slots / (engine.usage.slot_steps - before[1])

    return step

  return make


def run() -> int:
  values = flags.FLAGS
  loaded = himap_jax.load(values.checkpoint, dtype=values.dtype)
  make = steps(loaded, Image.open(PICTURE).convert("RGB"), values.max_new_tokens)
  count = len(RUNGS[0])
  shares = [(values.slots + rung) // count for rung in range(count)]
  padded, pools = make(count - 1, values.slots), [make(rung, share) for rung, share in enumerate(shares)]
  sides = [padded, *pools]
  _, *turns = [[side() for side in sides] for _ in range(1 + values.turns)]  # the first compiles
  padded_ms, *pools_ms = (1000 * statistics.median(turn) for turn in zip(*turns, strict=True))
  print(f"one pool of {values.slots} slots: {padded_ms:.1f} ms a step")
  each = ", ".join(f"{own:.1f} ms for {share}" for own, share in zip(pools_ms, shares, strict=True))
  print(f"a pool for each rung: {sum(pools_ms):.1f} ms ({each})")
  return 0


if __name__ == "__main__":
  define_flags()
  command.start_action("rungs", run, resumes=False)
