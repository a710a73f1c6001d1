"""What is measured: prompts and outputs of given sizes."""

import dataclasses

NUM_SYSTEM_TOKENS = 35  # of LLaVA-1.5's system prompt, before the image


@dataclasses.dataclass(frozen=True)
class Scenario:
  """One measurement's prompt and output.

  Attributes:
    geometry: a key of `geometries.GEOMETRIES`.
    num_instruction_tokens: text tokens after the image.
    batch_size: rows, all alike.
    num_new_tokens: tokens generated, whatever they are.
  """

  geometry: str
  num_instruction_tokens: int
  batch_size: int
  num_new_tokens: int

  @property
  def num_text_tokens(self) -> int:
    """System prompt and instruction."""
    return NUM_SYSTEM_TOKENS + self.num_instruction_tokens
