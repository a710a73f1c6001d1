"""Sizes that the costs of prompts and pruning criteria depend on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelSizes:
  """The sizes of a model of any family; those without a prefix are the decoder's.

  Attributes:
    num_features: width of the connector's input.
    tower_flops: multiplications of the vision tower for one tile or patch.
    tower_flops_per_pair: those for every pair of a row's patches, which attention adds in towers for patches; else 0.
    connector_flops: multiplications of the connector for one tile or patch.
    cross_layers: layers in which the text reads image tokens, if these are no part of the sequence.
    connector_flops_per_token: those per image token, where each is connected by itself; else 0.
  """

  num_layers: int
  hidden_size: int
  intermediate_size: int
  num_heads: int
  num_key_heads: int
  head_dim: int
  vocab_size: int
  tower_width: int
  tower_heads: int
  num_features: int
  tower_flops: int
  tower_flops_per_pair: int
  connector_flops: int
  connector_flops_per_token: int
  cross_layers: tuple[int, ...] = ()

  @property
  def query_width(self) -> int:
    return self.num_heads * self.head_dim

  @property
  def key_width(self) -> int:
    return self.num_key_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes that the cost of a criterion depends on.

  Attributes:
    num_image_tokens: N, before any pruning.
    num_present: M, image tokens that the criterion sees.
    num_text_tokens: text tokens of the prompt, all counted as following the image.
    keep: K, image tokens that it keeps.
  """

  model: ModelSizes
  num_image_tokens: int
  num_present: int
  num_text_tokens: int
  keep: int

  @property
  def num_slots(self) -> int:
    """Length of the sequence that the criterion sees."""
    return self.num_present + self.num_text_tokens

  def attention(self, num_rows: int) -> int:
    """Multiplications for the attention probabilities of query rows over the sequence, in all heads."""
    return num_rows * self.num_slots * self.model.query_width

  def class_attention(self) -> int:
    """Multiplications for the class token's attention in one tower layer."""
    return self.num_image_tokens * self.model.tower_width
