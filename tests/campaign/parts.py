"""All parts of the campaign."""

from campaign import concurrent_use, interruptions
from campaign.trials import Part

PARTS: dict[str, Part] = {
  "interruptions": interruptions.PART,
  "concurrent": concurrent_use.PART,
}
