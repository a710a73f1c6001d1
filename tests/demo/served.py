"""What the tests of the page share: the model that is served, its pruning, and what visitors may ask for."""

from himap_jax.demo.page import Limits

NAME = "clip_mha"
SETTING = ("himap", (2, 4), (8, 3))
LIMITS = Limits(picture_bytes=100_000, picture_pixels=10_000, waiting=4)
