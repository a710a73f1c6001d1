"""All parts of the campaign."""

from campaign import interruptions
from campaign.trials import Part

PARTS: dict[str, Part] = {"interruptions": interruptions.PART}
