"""All parts of the campaign."""

from campaign.trials import Part

PARTS: dict[str, Part] = {}
