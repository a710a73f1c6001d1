"""Sizes of a model of any family; a family builds them from a checkpoint's `config.json`."""

import dataclasses
from typing import Any, Literal


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
    """Width of the concatenated features."""
    return len(self.feature_layers) * self.hidden_size


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
  """The two linear layers between tower and decoder."""

  hidden_act: str
  use_bias: bool


@dataclasses.dataclass(frozen=True)
class LinearConfig:
  """A linear layer with a bias between tower and decoder."""


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
  """Learned queries that attend to the tower's features; `num_queries`, a square number, is that of image tokens."""

  num_queries: int
  num_heads: int
  layer_norm_eps: float


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
    norm_offset: whether norms multiply by 1 + weight, in float32.
    embedding_scale: factor of text embeddings; image tokens are not scaled.
    sliding_window: tokens that a query sees in `sliding_layers`, its own included.
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
  norm_offset: bool = False
  embedding_scale: float = 1.0
  sliding_window: int | None = None
  sliding_layers: tuple[int, ...] = ()
  cross_attention_layers: tuple[int, ...] = ()
  num_extra_embeddings: int = 0

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
  """

  vision: VisionConfig
  connector: ConnectorConfig | LinearConfig | ResamplerConfig
  text: TextConfig
  image_token_id: int
  has_newline: bool = False

  @property
  def method_inputs(self) -> dict[str, Any]:
    """What a pruning method must know of the model; see `pruning.methods.PruningConfig.schedule`."""
    return dict(
      num_layers=self.text.num_hidden_layers,
      has_class_token=self.vision.has_class_attention,
      cross_layers=self.text.cross_attention_layers,
    )

  def num_image_tokens(self, height: int, width: int) -> int:
    """Image tokens of a picture of `height` × `width` pixels, or of one whose tiles are of that size."""
    if isinstance(self.connector, ResamplerConfig):
      return self.connector.num_queries
    return self.num_features(height, width)

  def num_features(self, height: int, width: int) -> int:
    """Tokens that enter the connector for such a picture."""
    vision = self.vision
    tokens = (height // vision.patch_size) * (width // vision.patch_size) + vision.has_class_token
    return (tokens - (vision.select_strategy == "default")) * vision.tiles_per_picture
