"""What the cost of a prompt and of a pruning criterion depends on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelSizes:
  """The sizes of a model of any family; those without a prefix are the decoder's.

  Attributes:
    tower_layers: layers of the vision tower that run, up to the last one that features are taken from.
    num_features: width of what the connector reads.
    has_class_token: whether a class token stands before the tower's patches.
    drops_first_token: whether the tower's first token is no image token.
    connector_flops_per_token: multiplications of the connector for one image token.
  """

  num_layers: int
  hidden_size: int
  intermediate_size: int
  num_heads: int
  num_key_heads: int
  head_dim: int
  vocab_size: int
  tower_layers: int
  tower_width: int
  tower_feed_forward: int
  tower_heads: int
  patch_size: int
  num_features: int
  has_class_token: bool
  drops_first_token: bool
  connector_flops_per_token: int

  @property
  def query_width(self) -> int:
    """Width of all query heads."""
    return self.num_heads * self.head_dim

  @property
  def key_width(self) -> int:
    """Width of all key heads."""
    return self.num_key_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the cost of a criterion depends on.

  Attributes:
    model: the model.
    num_image_tokens: before any pruning, N.
    num_present: image tokens that the criterion sees, M.
    num_text_tokens: text tokens of the prompt; they all stand after the image when costs are counted.
    keep: image tokens that it keeps, K.
  """

  model: ModelSizes
  num_image_tokens: int
  num_present: int
  num_text_tokens: int
  keep: int

  @property
  def num_slots(self) -> int:
    """Tokens of the sequence that the criterion sees."""
    return self.num_present + self.num_text_tokens

  def attention(self, num_rows: int) -> int:
    """Multiplications of attention probabilities of some query rows over the sequence, in all heads."""
    return num_rows * self.num_slots * self.model.query_width

  def class_attention(self) -> int:
    """Multiplications of the class token's attention in one layer of the tower."""
    return self.num_image_tokens * self.model.tower_width
