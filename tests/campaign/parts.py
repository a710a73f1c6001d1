"""All parts of the campaign."""

from campaign import (
  batch_mates,
  fuzz_configs,
  fuzz_flags,
  fuzz_pictures,
  fuzz_processors,
  fuzz_prompts,
  fuzz_weights,
  hostile,
)
from campaign.trials import Part

PARTS: dict[str, Part] = {
  "fuzz_prompts": fuzz_prompts.PART,
  "fuzz_pictures": fuzz_pictures.PART,
  "fuzz_configs": fuzz_configs.PART,
  "fuzz_processors": fuzz_processors.PART,
  "fuzz_weights": fuzz_weights.PART,
  "fuzz_flags": fuzz_flags.PART,
  "hostile": hostile.PART,
  "batch_mates": batch_mates.PART,
}
