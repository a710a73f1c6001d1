"""Model inputs: a prepared prompt on the host, a batch of prompts, and the layout of its slots.

Axes: B batch, S slots, A axes of positions (none for one), P tiles or patches of a row, N image tokens of a row before
pruning, M image tokens, T other slots, Q queries, K kept image tokens, R remaining slots, D model dim,
F values of a patch, taps: connector outputs of which an image token is the sum.

A row is padded on the right; otherwise its image tokens may be anywhere, in any number of runs:

    [ text | image …… image | text | image … | text | padding ]

Pruning removes image tokens and shifts the rest of the row to the left, so a pruned row has the same form.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

TEXT, IMAGE, PADDING = 0, 1, 2

# The order of padding: later than any query's, hence never visible.
UNUSED_ORDER = np.iinfo(np.int32).max


def pytree(cls: type) -> type:
  """A frozen dataclass that is a pytree; its leaves may be arrays, shapes or shardings."""
  cls.__no_type_check__ = True
  return flax.struct.dataclass(cls)


def take_slots(x: Shaped[Array, "B S *D"], slots: Int[Array, "B R"]) -> Shaped[Array, "B R *D"]:
  """Gathers slots of each row."""
  return jnp.take_along_axis(x, slots.reshape(*slots.shape, *[1] * (x.ndim - 2)), axis=1)


def put_slots(
  x: Shaped[Array, "B S *D"], slots: Int[Array, "B R"], values: Shaped[Array, "B R *D"]
) -> Shaped[Array, "B S *D"]:
  """Replaces slots of each row; slots past the last are ignored."""
  return jax.vmap(lambda row, at, new: row.at[at].set(new))(x, slots, values)


def pad_to(x: Shaped[Array, "..."], multiples: Mapping[int, int], *, fill: int = 0) -> Shaped[Array, "..."]:
  """Pads axes at their ends to multiples, by axis."""
  return jnp.pad(x, [(0, -size % multiples.get(axis, 1)) for axis, size in enumerate(x.shape)], constant_values=fill)


def first_slots(chosen: Bool[Array, "B S"], count: int) -> Int[Array, "B R"]:
  """The first `count` slots after a stable sort that puts the chosen ones first."""
  return jnp.argsort(~chosen, axis=1, stable=True)[:, :count]


def visible(
  keys: Int[Array, "B S"],
  queries: Int[Array, "B Q"],
  window: int | None = None,
  same_image: Bool[Array, "B Q S"] | None = None,
) -> Bool[Array, "B Q S"]:
  """Whether queries may attend to keys of the given orders: none later, and none `window` or more earlier.

  Where `same_image` is true they may attend to later keys, too.
  """
  keys, queries = keys[:, None], queries[:, :, None]
  seen = keys <= queries if same_image is None else (keys <= queries) | same_image
  return seen if window is None else seen & (keys > queries - window)


@pytree
class Calibration:
  """What is known of removed image tokens where attention to the others is calibrated; see `model.calibration`.

  Attributes:
    log_count: `[B, S]` float32, for an image token the logarithm of the row's image tokens before the last removal over
      those after it; 0 for other tokens.
    is_left: `[B, S]` which are image tokens of a row that has lost some.
    layer: the first layer after the last removal; static.
  """

  log_count: Float[Array, "B S"]
  is_left: Bool[Array, "B S"]
  layer: int = flax.struct.field(pytree_node=False)


@pytree
class Layout:
  """Contents of each slot of a batch.

  Attributes:
    kind: `[B, S]` int32, `TEXT`, `IMAGE` or `PADDING`.
    image_id: `[B, S]` index of the token's image in the row; −1 outside images.
    image_token: `[B, S]` index of the image token in the row before pruning; −1 outside images.
    order: `[B, S]` the slot's index before pruning inside the decoder, `UNUSED_ORDER` in padding; it decides
      visibility.
    is_instruction: `[B, S]` whether the slot is text after the row's last image token before pruning.
    num_image_tokens: M, the maximum number of image tokens per row; static.
    is_ragged: whether rows may have fewer; static.
    is_bidirectional: whether image tokens see the later tokens of their image, too; static. It belongs to a model, so
      it is false in layouts of inputs.
    window: how many orders back a query sees, its own included; None for all; static. It belongs to a layer, so it is
      None in layouts of inputs.
    calibration: of the attention to image tokens; None without, as in layouts of inputs.
  """

  kind: Int[Array, "B S"]
  image_id: Int[Array, "B S"]
  image_token: Int[Array, "B S"]
  order: Int[Array, "B S"]
  is_instruction: Bool[Array, "B S"]
  num_image_tokens: int = flax.struct.field(pytree_node=False)
  is_ragged: bool = flax.struct.field(pytree_node=False, default=False)
  is_bidirectional: bool = flax.struct.field(pytree_node=False, default=False)
  window: int | None = flax.struct.field(pytree_node=False, default=None)
  calibration: Calibration | None = None

  @classmethod
  def of_rows(
    cls, kind: np.ndarray, image_id: np.ndarray, num_image_tokens: int, *, is_ragged: bool = False
  ) -> "Layout":
    """The layout of unpruned rows, on the host."""
    image, slot = kind == IMAGE, np.arange(kind.shape[1], dtype=np.int32)[None]
    last_image = np.where(image, slot, -1).max(axis=1, keepdims=True)
    return cls(
      kind=kind.astype(np.int32),
      image_id=np.where(image, image_id, -1).astype(np.int32),
      image_token=np.where(image, image.cumsum(axis=1) - 1, -1).astype(np.int32),
      order=np.where(kind == PADDING, UNUSED_ORDER, slot).astype(np.int32),
      is_instruction=(kind == TEXT) & (slot > last_image),
      num_image_tokens=num_image_tokens,
      is_ragged=is_ragged,
    )

  @property
  def num_slots(self) -> int:
    return self.kind.shape[1]

  def num_tokens(self) -> Int[Array, "B"]:
    """Tokens of each row, without padding."""
    return (self.kind != PADDING).sum(axis=1, dtype=jnp.int32)

  def last_slot(self) -> Int[Array, "B"]:
    """Slot of each row's last token."""
    return self.num_tokens() - 1

  def image_slots(self) -> Int[Array, "B M"]:
    """Slots of the image tokens, ascending; in a row with fewer than M, followed by other slots."""
    return first_slots(self.kind == IMAGE, self.num_image_tokens)

  def num_present(self) -> Int[Array, "B"]:
    """Image tokens of each row."""
    return (self.kind == IMAGE).sum(axis=1, dtype=jnp.int32)

  def image_present(self) -> Bool[Array, "B M"]:
    """Which of `image_slots` hold an image token."""
    return jnp.arange(self.num_image_tokens, dtype=jnp.int32)[None] < self.num_present()[:, None]

  def original(self) -> Int[Array, "B M"]:
    """Indices of the image tokens before pruning, ascending."""
    return take_slots(self.image_token, self.image_slots())

  def text_slots(self) -> Int[Array, "B T"]:
    """Slots of all other tokens and padding, ascending."""
    return first_slots(self.kind != IMAGE, self.num_slots - self.num_image_tokens)

  def instruction_slots(self) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Slots of each row's instruction, ascending, followed by other slots; and a mask of the former."""
    slots = first_slots(self.is_instruction, self.num_slots - self.num_image_tokens)
    return slots, take_slots(self.is_instruction, slots)

  def visible(self, slots: Int[Array, "B Q"] | None = None) -> Bool[Array, "B Q S"]:
    """Slots that the queries in `slots`, or in all slots, may attend to.

    No padding, none outside the window, and none that is later but those of the query's image where these see each
    other.
    """
    order, image_id = (x if slots is None else take_slots(x, slots) for x in (self.order, self.image_id))
    same_image = None
    if self.is_bidirectional:
      same_image = (image_id[:, :, None] == self.image_id[:, None]) & (image_id >= 0)[:, :, None]
    return visible(self.order, order, self.window, same_image)

  def keep(
    self, kept: Int[Array, "B K"], present: Bool[Array, "B K"] | None = None
  ) -> tuple[Int[Array, "B R"], "Layout"]:
    """Keeps some image tokens and everything else.

    Args:
      kept: indices into the M image tokens, ascending.
      present: which of these the row really keeps, all if absent; the others become padding.

    Returns:
      The source slot of each of the R = S − M + K remaining slots, and the layout after pruning.
    """
    slot = jnp.arange(self.num_slots, dtype=jnp.int32)[None]
    kept_slots = take_slots(self.image_slots(), kept)
    if present is not None:
      kept_slots = jnp.where(present, kept_slots, -1)
    is_kept = (kept_slots[:, :, None] == slot[:, None]).any(axis=1) | (self.kind != IMAGE)
    source = first_slots(is_kept, self.num_slots - self.num_image_tokens + kept.shape[1])
    pruned = jax.tree.map(lambda x: take_slots(x, source), self).replace(num_image_tokens=kept.shape[1])
    if present is None:
      return source, pruned
    remains = take_slots(is_kept, source)
    padding = pruned.replace(kind=PADDING, image_id=-1, image_token=-1, order=UNUSED_ORDER, is_instruction=False)
    return source, jax.tree.map(lambda x, unused: jnp.where(remains, x, unused), pruned, padding)


def put_image_tokens(
  x: Float[Array, "B S D"], image_tokens: Float[Array, "B M D"], layout: Layout
) -> Float[Array, "B S D"]:
  """Writes each row's image tokens into its image slots, in order."""
  if not layout.num_image_tokens:
    return x
  is_image = layout.kind == IMAGE
  number = jnp.cumsum(is_image, axis=1, dtype=jnp.int32) - 1
  image = take_slots(image_tokens, jnp.clip(number, 0, image_tokens.shape[1] - 1))
  return jnp.where(is_image[:, :, None], image, x)


@pytree
class Images:
  """The pictures of a batch as a tower reads them; of a single prompt without the axis B.

  Image token n is the sum over t of `pack_weight[n, t]` times the connector's output `pack_index[n, t]`, where the
  outputs of all tiles follow each other and −1 is the learned newline. Without `pack_index` the image tokens are the
  connector's outputs.

  Attributes:
    pixels: `[B, P, 3, height, width]` preprocessed pictures, or tiles of them, all of one size; or `[B, P, F]` flattened
      patches of pictures of any size.
    coordinates: `[B, P, 3]` of patches, or of tiles of pictures cut into several: the picture's index in the row, row
      and column; −1 in padding. None for other tiles.
    pack_index: `[B, N, taps]` or None.
    pack_weight: `[B, N, taps]`; None if all are one.
  """

  pixels: Float[Array, "..."]
  coordinates: Int[Array, "*B P 3"] | None = None
  pack_index: Int[Array, "*B N t"] | None = None
  pack_weight: Float[Array, "*B N t"] | None = None

  @property
  def is_padding(self) -> Bool[Array, "B P"]:
    """Which of a batch's tiles or patches are padding."""
    if self.coordinates is None:
      return jnp.zeros(self.pixels.shape[:2], bool)
    return self.coordinates[:, :, 0] < 0


@pytree
class Inputs:
  """A batch of prompts.

  Attributes:
    tokens: `[B, S]` token ids; the image token's id in image slots.
    positions: `[B, S]` rotary positions, or `[B, S, A]` along several axes; 0 in padding.
  """

  tokens: Int[Array, "B S"]
  layout: Layout
  positions: Int[Array, "B S *A"]
  images: Images


class ImageSize(NamedTuple):
  """Tiles (or patches) and image tokens of a row's pictures."""

  num_tiles: int
  num_tokens: int


@dataclasses.dataclass(frozen=True)
class Example:
  """One prepared prompt, on the host; fields as in `Inputs` and `Layout`, without padding.

  Attributes:
    picture_sizes: `(width, height)` of the pictures, in pixels, where a family needs them to place image tokens.
  """

  tokens: Int[np.ndarray, "S"]
  image_id: Int[np.ndarray, "S"]
  positions: Int[np.ndarray, "S *A"]
  images: Images
  picture_sizes: tuple[tuple[int, int], ...] = ()

  @property
  def num_images(self) -> int:
    return int(self.image_id.max(initial=-1)) + 1

  @property
  def size(self) -> ImageSize:
    return ImageSize(len(self.images.pixels), self.num_image_tokens)

  @property
  def num_image_tokens(self) -> int:
    return int((self.image_id >= 0).sum())

  @property
  def num_text_tokens(self) -> int:
    return len(self.tokens) - self.num_image_tokens
