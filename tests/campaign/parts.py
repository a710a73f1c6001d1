"""All parts of the campaign."""

from campaign import concurrent_use, interruptions, soak
from campaign.trials import Part

PARTS: dict[str, Part] = {
  "interruptions": interruptions.PART,
  "concurrent": concurrent_use.PART,
  "soak": soak.PART,
}
