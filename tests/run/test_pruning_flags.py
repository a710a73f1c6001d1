"""The pruning flags as one text: the same as the flags of a command, and no others."""

import pytest
from absl import flags
from absl.testing import flagsaver

from himap_jax.errors import UserError
from himap_jax.pruning.config import PruningConfig
from himap_jax.run import model_flags, pruning_flags

TEXTS = {
  "--method=himap --prune_layers=2,8 --keep=288,72": PruningConfig("himap", (2, 8), (288, 72)),
  "--method=fastv --keep=12.5%": PruningConfig("fastv", None, (0.125,)),
  "--method=none": PruningConfig("none"),
  "--method=fastv --keep=25% --restore": PruningConfig("fastv", None, (0.25,), restore=True),
  "--method=divprune --keep=64 --keep_positions": PruningConfig("divprune", None, (64,), keep_positions=True),
  "--method=divprune+himap --prune_layers=0,2,8 --keep=300,288,72": PruningConfig(
    "divprune+himap", (0, 2, 8), (300, 288, 72)
  ),
  "--method=himap_adaptive --method_parameters=threshold:0.8": PruningConfig(
    "himap_adaptive", parameters=(("threshold", 0.8),)
  ),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_the_command_reads(text):
  assert pruning_flags.parse(text) == TEXTS[text]
  assert pruning_flags.text(TEXTS[text]) == text
  with flagsaver.flagsaver():
    flags.FLAGS(["run", *text.split()])
    assert model_flags.values_from_flags()["pruning"] == TEXTS[text]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("--flagfile=/etc/passwd", "'--flagfile=/etc/passwd' is none of --method="),
    ("--method=himap --schedule=x.json", "'--schedule=x.json' is none of"),
    ("--checkpoint=demo", "is none of"),
    ("himap", "'himap' is none of"),
    ("restore", "'restore' is none of"),
    ("--method=magic", "unknown method 'magic'"),
    ("--keep=many", "--keep=many: not a list of numbers"),
    ("--restore=maybe", "maybe"),
    ('--keep="', "keep"),
  ],
)
def test_what_a_text_cannot_say(text, message):
  with pytest.raises(UserError, match=message):
    pruning_flags.parse(text)
