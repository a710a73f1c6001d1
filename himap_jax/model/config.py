"""Sizes of a model of any family; a family builds them from a checkpoint's `config.json`."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TilingConfig:
  """Pictures that enter the tower as several tiles, each with its own class token, which see each other.

  Attributes:
    max_num_tiles: tiles of every picture, those of padding included.
    arrangements: rows and columns of tiles, in the order of their embeddings; the first embedding is that of none.
    num_global_layers: the last layers, whose output is a feature; they follow a second embedding of the tiles.
  """

  max_num_tiles: int
  arrangements: tuple[tuple[int, int], ...]
  num_global_layers: int


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """A vision tower.

  Attributes:
    model_type: one of `towers.TOWERS`.
    num_hidden_layers: layers in the checkpoint; only those up to the last feature layer are run.
    image_size: side in pixels of the square that the position embedding was trained on.
    patch_size: side of a patch in pixels.
    feature_layers: non-negative indices into the hidden states (0 is the embedding); their features are concatenated.
    select_strategy: `default` drops the first token, `full` keeps every token.
    has_class_token: whether a class token precedes the patches.
    patch_bias: whether the patch embedding has a bias.
    qk_norm: whether queries and keys are normalised, over all heads together.
    final_norm: whether the tower's last norm is applied to the features.
    merge_size: side of the squares of patches whose features are concatenated, row by row, to those of one image token.
    pool: side, in patches, of the squares whose features are averaged.
    deepstack_layers: layers whose outputs are also connected, and added in the first layers of the decoder.
    tiling: how pictures are cut into tiles; None if each is one tile.
  """

  model_type: str
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  image_size: int
  patch_size: int
  hidden_act: str
  layer_norm_eps: float
  feature_layers: tuple[int, ...]
  select_strategy: str
  has_class_token: bool
  patch_bias: bool = True
  qkv_bias: bool = True
  norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
  qk_norm: bool = False
  final_norm: bool = False
  merge_size: int = 1
  pool: int = 1
  deepstack_layers: tuple[int, ...] = ()
  tiling: TilingConfig | None = None

  @property
  def tiles_per_picture(self) -> int:
    return 1 if self.tiling is None else self.tiling.max_num_tiles

  @property
  def has_class_attention(self) -> bool:
    """Whether there is one class token, which sees the whole picture."""
    return self.has_class_token and self.tiling is None

  @property
  def num_layers_run(self) -> int:
    """Layers up to the last feature layer."""
    return max(self.feature_layers)

  @property
  def num_features(self) -> int:
    """Width of the concatenated features of an image token."""
    return len(self.feature_layers) * self.hidden_size * self.merge_size**2

  def num_patches(self, height: int, width: int) -> int:
    """Patches of a picture of `height` × `width` pixels."""
    return (height // self.patch_size) * (width // self.patch_size)


@dataclasses.dataclass(frozen=True)
class PatchVisionConfig(VisionConfig):
  """A vision tower for the patches of pictures of any size.

  Attributes:
    rope_theta: base of the rotary position embedding along rows and columns.
    window_size: side, in patches, of the windows that attention is confined to; None for whole pictures.
    full_attention_layers: layers whose attention is confined to pictures alone.
    is_gated: whether the feed-forward is gated.
    has_position_embedding: whether a learned grid of positions is interpolated, of the size `image_size`.
  """

  rope_theta: float = 10_000.0
  window_size: int | None = None
  full_attention_layers: tuple[int, ...] = ()
  is_gated: bool = False
  has_position_embedding: bool = False


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
  """The two linear layers between tower and decoder, and the epsilon of the layer norm before them, if there is one."""

  hidden_act: str
  use_bias: bool
  layer_norm_eps: float | None = None


@dataclasses.dataclass(frozen=True)
class LinearConfig:
  """One linear layer between tower and decoder."""

  use_bias: bool


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
  """Learned queries that attend to the tower's features; `num_queries`, a square number, is that of image tokens."""

  num_queries: int
  num_heads: int
  layer_norm_eps: float


@dataclasses.dataclass(frozen=True)
class MergerConfig:
  """A norm of each of `num_parts` equal parts of the features, then two linear layers."""

  num_parts: int
  norm_type: Literal["layer_norm", "rms_norm"]
  layer_norm_eps: float


@dataclasses.dataclass(frozen=True)
class NormLinearConfig:
  """An RMSNorm and a linear map."""

  rms_norm_eps: float


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding; scaling types and their parameters as in `config.json`.

  Attributes:
    sections: frequencies of every axis of positions, if they have several; see `rope.axis_of_frequency`.
    interleaved: whether the axes take turns.
  """

  theta: float
  rope_type: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192
  sections: tuple[int, ...] = ()
  interleaved: bool = False


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """A decoder of the LLaMA line; names as in `config.json`, or else:

  Attributes:
    qkv_bias: whether query, key and value projections have biases.
    output_bias: whether the output projection of the attention has one.
    rotary_dim: leading features of a head that are rotated.
    qk_norm: whether queries and keys of every head are normalised before they are rotated.
    query_scale: factor of rotated queries, besides the head_dim^-½ of the attention.
    output_norms: whether the outputs of attention and feed-forward are normalised, too, before they are added.
    norm_offset: whether norms multiply by 1 + weight, in float32.
    embedding_scale: factor of text embeddings; image tokens are not scaled.
    local_rope: rotary embedding of `local_layers`, if it differs from that of the others.
    sliding_window: tokens that a query sees in `sliding_layers`, its own included.
    is_bidirectional: whether image tokens see the later tokens of their image, too.
    cross_attention_layers: layers in which the text reads image tokens, which then are no part of the sequence.
    num_extra_embeddings: embeddings of tokens after those of the head.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float
  max_position_embeddings: int
  tie_word_embeddings: bool
  hidden_act: str
  rope: RopeConfig
  rotary_dim: int
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  query_scale: float = 1.0
  output_norms: bool = False
  norm_offset: bool = False
  embedding_scale: float = 1.0
  local_rope: RopeConfig | None = None
  local_layers: tuple[int, ...] = ()
  sliding_window: int | None = None
  sliding_layers: tuple[int, ...] = ()
  is_bidirectional: bool = False
  cross_attention_layers: tuple[int, ...] = ()
  num_extra_embeddings: int = 0

  def rope_of(self, layer: int) -> RopeConfig:
    """The rotary embedding of a layer."""
    return self.local_rope if layer in self.local_layers else self.rope

  def window(self, layer: int) -> int | None:
    """The window of a layer; None if queries see all earlier tokens."""
    return self.sliding_window if layer in self.sliding_layers else None

  def within(self, length: int) -> "TextConfig":
    """The same decoder for at most `length` tokens, without a window that hides none of them."""
    hides = self.sliding_window is not None and self.sliding_window < length
    return self if hides else dataclasses.replace(self, sliding_window=None, sliding_layers=())


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A vision-language model.

  Attributes:
    image_token_id: fills the image slots of `Inputs.tokens`.
    has_newline: whether there is a learned image token that ends a row of patches.
    num_taps: outputs of the connector that an image token is a weighted sum of; see `inputs.Images`.
  """

  vision: VisionConfig
  connector: ConnectorConfig | LinearConfig | NormLinearConfig | ResamplerConfig | MergerConfig
  text: TextConfig
  image_token_id: int
  has_newline: bool = False
  num_taps: int = 1

  @property
  def has_feature_per_token(self) -> bool:
    """Whether an image token other than a newline is the connector's image of one feature."""
    return self.num_taps == 1 and not isinstance(self.connector, ResamplerConfig)

  @property
  def has_grid(self) -> bool:
    """Whether these features are a grid in every tile: no class token is among them, and no patch is dropped."""
    vision = self.vision
    is_tower_for_tiles = vision.tiling is None and not isinstance(vision, PatchVisionConfig)
    every_patch = vision.has_class_token == (vision.select_strategy == "default")
    return self.has_feature_per_token and is_tower_for_tiles and every_patch

  def num_image_tokens(self, height: int, width: int) -> int:
    """Image tokens of a picture of `height` × `width` pixels, or of one whose tiles are of that size."""
    if isinstance(self.connector, ResamplerConfig):
      return self.connector.num_queries
    return self.num_features(height, width) * self.vision.tiles_per_picture

  def num_features(self, height: int, width: int) -> int:
    """Tokens that enter the connector for such a picture, or for one of its tiles."""
    vision = self.vision
    tokens = vision.num_patches(height, width) + vision.has_class_token - (vision.select_strategy == "default")
    return tokens // (vision.merge_size * vision.pool) ** 2
