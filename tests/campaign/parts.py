"""All parts of the campaign."""

from campaign import fuzz_configs, fuzz_pictures, fuzz_prompts
from campaign.trials import Part

PARTS: dict[str, Part] = {
  "fuzz_prompts": fuzz_prompts.PART,
  "fuzz_pictures": fuzz_pictures.PART,
  "fuzz_configs": fuzz_configs.PART,
}
