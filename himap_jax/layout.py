"""Where the image stands in each row of a batch, before and after pruning.

Axes: B batch, S slots, N image tokens, M kept image tokens.

A row is padded on the right, and its image tokens are one run of slots:

    [ text | image …… image | text | padding ]
           ^ image_start             ^ length

Pruning shortens the run and moves the rest of the row to the left, so a pruned row has the same form.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Layout:
  """The form of a batch.

  Attributes:
    length: `[B]` slots that hold a token.
    image_start: `[B]` the first image slot.
    num_image_tokens: image slots of every row; static.
  """

  length: Int[Array, "B"]
  image_start: Int[Array, "B"]
  num_image_tokens: int = flax.struct.field(pytree_node=False)

  def image_slots(self) -> Int[Array, "B N"]:
    """The slots of the image tokens."""
    return self.image_start[:, None] + jnp.arange(self.num_image_tokens, dtype=jnp.int32)[None]

  def text_slots(self, num_slots: int) -> Int[Array, "B T"]:
    """The slots of everything else, padding included."""
    slot = jnp.arange(num_slots - self.num_image_tokens, dtype=jnp.int32)[None]
    return jnp.where(slot < self.image_start[:, None], slot, slot + self.num_image_tokens)

  def instruction_slots(self, num_slots: int) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """As many slots from the image's end on as there can be text, and which of them hold a token of the row."""
    after = self.image_start + self.num_image_tokens
    slots = after[:, None] + jnp.arange(num_slots - self.num_image_tokens, dtype=jnp.int32)[None]
    return jnp.minimum(slots, num_slots - 1), slots < self.length[:, None]

  def keep(self, kept: Int[Array, "B M"], num_slots: int) -> tuple[Int[Array, "B R"], "Layout"]:
    """Keeps some image tokens and all else.

    Args:
      kept: indices into the image tokens, ascending.
      num_slots: slots before pruning, S.

    Returns:
      The slot that each of the R = S − N + M remaining slots is taken from, and the layout after pruning.
    """
    num_kept = kept.shape[1]
    removed = self.num_image_tokens - num_kept
    slot = jnp.arange(num_slots - removed, dtype=jnp.int32)[None]
    start = self.image_start[:, None]
    image = start + jnp.take_along_axis(kept, jnp.clip(slot - start, 0, num_kept - 1), axis=1)
    source = jnp.where(slot < start, slot, jnp.where(slot < start + num_kept, image, slot + removed))
    return source, Layout(self.length - removed, self.image_start, num_kept)


def take_slots(x: Float[Array, "B S *D"], slots: Int[Array, "B R"]) -> Float[Array, "B R *D"]:
  """What each row holds in some of its slots."""
  return jnp.take_along_axis(x, slots.reshape(*slots.shape, *[1] * (x.ndim - 2)), axis=1)


def put_image_tokens(
  x: Float[Array, "B S D"], image_start: Int[Array, "B"], image_tokens: Float[Array, "B N D"]
) -> Float[Array, "B S D"]:
  """`x` with the image tokens in their slots."""
  num_image_tokens = image_tokens.shape[1]
  offset = jnp.arange(x.shape[1], dtype=jnp.int32)[None] - image_start[:, None]
  image = jnp.take_along_axis(image_tokens, jnp.clip(offset, 0, num_image_tokens - 1)[:, :, None], axis=1)
  return jnp.where(((offset >= 0) & (offset < num_image_tokens))[:, :, None], image, x)
