"""What the tests of the page share: the model that is served and its pruning."""

NAME = "clip_mha"
SETTING = ("himap", (2, 4), (8, 3))
