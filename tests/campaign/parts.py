"""All parts of the campaign."""

from campaign import (
  batch_mates,
  concurrent_use,
  fuzz_configs,
  fuzz_flags,
  fuzz_layouts,
  fuzz_pictures,
  fuzz_processors,
  fuzz_prompts,
  fuzz_weights,
  hostile,
  interruptions,
  soak,
)
from campaign.trials import Part

PARTS: dict[str, Part] = {
  "interruptions": interruptions.PART,
  "concurrent": concurrent_use.PART,
  "soak": soak.PART,
  "fuzz_prompts": fuzz_prompts.PART,
  "fuzz_pictures": fuzz_pictures.PART,
  "fuzz_configs": fuzz_configs.PART,
  "fuzz_processors": fuzz_processors.PART,
  "fuzz_weights": fuzz_weights.PART,
  "fuzz_flags": fuzz_flags.PART,
  "fuzz_layouts": fuzz_layouts.PART,
  "hostile": hostile.PART,
  "batch_mates": batch_mates.PART,
}
