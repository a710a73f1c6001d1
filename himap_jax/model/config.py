"""The sizes of a model, whatever its family; a family builds them from a checkpoint's `config.json`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """A vision tower.

  Attributes:
    model_type: one of `towers.TOWERS`.
    hidden_size: width of the tower.
    intermediate_size: width of its feed-forward.
    num_hidden_layers: layers in the checkpoint; only those up to the last feature layer are run.
    num_attention_heads: heads.
    image_size: side in pixels of the square the position embedding was trained on.
    patch_size: side of a patch in pixels.
    hidden_act: activation of the feed-forward.
    layer_norm_eps: epsilon of the layer norms.
    feature_layers: indices into the tower's hidden states (0 is the embedding), non-negative; their features are
      concatenated.
    select_strategy: `default` drops the first token, `full` keeps every token.
    has_class_token: whether a class token stands before the patches.
    qkv_bias: whether query, key and value have biases.
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
  qkv_bias: bool = True

  @property
  def num_layers_run(self) -> int:
    """Layers up to the last that the features need."""
    return max(self.feature_layers)

  @property
  def num_features(self) -> int:
    """Width of the features."""
    return len(self.feature_layers) * self.hidden_size


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
  """The two linear layers between tower and decoder: the activation between them, and whether they have biases."""

  hidden_act: str
  use_bias: bool


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding: base `theta`, scaling `rope_type` and, for the scaled types, its parameters."""

  theta: float
  rope_type: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """A LLaMA-family decoder; the names are those of `config.json`."""

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
  attention_bias: bool
  mlp_bias: bool
  hidden_act: str
  rope: RopeConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A vision-language model.

  Attributes:
    vision: the tower.
    connector: what maps its features to the decoder's width.
    text: the decoder.
    image_token_id: the token that stands for one image token in `Inputs.tokens`.
  """

  vision: VisionConfig
  connector: ConnectorConfig
  text: TextConfig
  image_token_id: int

  def num_image_tokens(self, height: int, width: int) -> int:
    """Image tokens of a picture of `height` × `width` pixels."""
    vision = self.vision
    tokens = (height // vision.patch_size) * (width // vision.patch_size) + vision.has_class_token
    return tokens - (vision.select_strategy == "default")
