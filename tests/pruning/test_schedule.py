"""Schedules of methods: their defaults, what is counted from shares, and choices that no model can run."""

import pytest

from himap_jax import PruningConfig, Schedule, UserError, build_schedule
from himap_jax.pruning import methods
from himap_jax.run import command


def schedule(method, **settings):
  return build_schedule(method, **{"num_layers": 32, "num_image_tokens": 576, **settings})


@pytest.mark.parametrize(
  "method, stages",
  [
    ("none", []),
    ("himap", [(2, 288), (8, 72)]),
    ("himap_adaptive", [(2, 432), (8, 216)]),
    ("himap_swapped", [(2, 288), (8, 72)]),
    ("instruction_attention", [(2, 288)]),
    ("image_attention", [(8, 144)]),
    ("fastv", [(2, 288)]),
    ("pyramiddrop", [(8, 288), (16, 144), (24, 72)]),
    ("sparsevlm", [(2, 300), (6, 200), (15, 110)]),
    ("dart", [(2, 128)]),
    ("fastervlm", [(0, 144)]),
    ("visionzip", [(0, 64)]),
    ("vispruner", [(0, 128)]),
    ("divprune", [(0, 56)]),
    ("cdpruner", [(0, 64)]),
    ("prumerge", [(0, 144)]),
    ("random", [(0, 144)]),
    ("uniform", [(0, 144)]),
    ("divprune+himap", [(0, 56), (2, 28), (8, 7)]),
    ("random+himap", [(0, 144), (2, 72), (8, 18)]),
    ("random+himap_adaptive", [(0, 144), (2, 108), (8, 54)]),
  ],
)
def test_default_schedules(method, stages):
  assert [(stage.layer, stage.keep) for stage in schedule(method).stages] == stages


def test_default_schedule_of_fitprune():
  stages = schedule("fitprune").stages
  assert (stages[0].layer, stages[0].keep) == (1, 562)
  assert (stages[1].layer, stages[1].keep) == (2, 529)
  assert (stages[-1].layer, stages[-1].keep) == (29, 127)
  shallower = schedule("fitprune", num_layers=30).stages
  assert shallower[-1].keep == 127
  assert [stage.layer for stage in shallower] == sorted({stage.layer for stage in shallower})


def test_default_schedule_of_shortv():
  assert len(schedule("shortv").frozen_layers) == 19
  assert len(schedule("shortv", num_layers=40).frozen_layers) == 24
  assert schedule("shortv", num_layers=30, prune_layers=(29, 3)).frozen_layers == (3, 29)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(method="fasttv"), "unknown method 'fasttv'; known: "),
    (
      dict(method="visionzip", provides={"features", "sequence"}),
      "tower has none for the whole picture; methods that work: .*divprune, .*himap",
    ),
    (dict(method="fastervlm+himap", provides=()), "tower has none"),
    (
      dict(method="visionzip", provides={"class_attention", "sequence"}),
      "made of several each; methods that work: .*fastervlm, .*himap",
    ),
    (dict(method="himap+divprune"), "two methods combine"),
    (dict(method="random+fastervlm"), "two methods combine"),
    (dict(method="divprune+shortv"), "two methods combine"),
    (dict(method="divprune+himap+fastv"), "two methods combine"),
    (dict(method="divprune", prune_layers=(2,)), "acts before the decoder"),
    (dict(method="fastv", prune_layers=(0,)), "needs the attention of the previous layer"),
    (dict(method="divprune+fastv", prune_layers=(0, 0)), "needs the attention of the previous layer"),
    (dict(method="pyramiddrop", prune_layers=(8, 16)), "has 2 stages, but keep has 3 values"),
    (dict(method="shortv", num_layers=30), "has tables for decoders of 32 and 40 layers"),
    (dict(method="shortv", keep=(0.5,)), "keeps every image token"),
    (dict(method="shortv", prune_layers=(3, 32)), "cannot freeze layer 32"),
    (dict(method="shortv", prune_layers=(3, 3)), "named twice"),
    (dict(method="himap", parameters={"threshold": 0.5}), "no parameter 'threshold'; it has: none"),
    (dict(method="himap_adaptive", parameters={"treshold": 0.5}), "no parameter 'treshold'; it has: threshold"),
    (dict(method="himap_adaptive", parameters={"threshold": 0.0}), "threshold must be above 0"),
    (dict(method="himap_adaptive", parameters={"threshold": 1.5}), "threshold must be above 0"),
    (dict(method="himap_adaptive", keep=(0.1, 0.2)), "cannot keep 115 image tokens before layer 8: there are 58"),
  ],
)
def test_schedules_that_cannot_be(settings, message):
  with pytest.raises(UserError, match=message):
    schedule(**settings)


def test_parameters_are_no_part_of_a_schedule():
  """Equal and of equal hash, so that what was compiled for one serves the other."""
  default = schedule("himap_adaptive")
  other = schedule("random+himap_adaptive", prune_layers=(0, 2, 8), keep=(576, 432, 216), parameters={"threshold": 0.5})
  assert default.parameters == (("threshold", 0.8),)
  assert other.parameters == (("threshold", 0.5),)
  other = Schedule(other.stages[1:], parameters=other.parameters)
  assert default == other and hash(default) == hash(other)
  assert schedule("himap").parameters == ()


def test_a_choice_for_any_model():
  config = PruningConfig("himap_adaptive", (1, 3), (0.5, 9), (("threshold", 0.5),))
  expected = schedule("himap_adaptive", prune_layers=(1, 3), keep=(288, 9))
  assert config.schedule(32, 576) == expected
  assert config.schedule(32, 576).parameters == (("threshold", 0.5),)
  assert PruningConfig().schedule(32, 576) == schedule("himap")
  with pytest.raises(UserError, match="tower has none"):
    PruningConfig("fastervlm").schedule(32, 576, provides=())


def test_shares_are_of_each_prompt_s_own_tokens():
  for method, counts in (("himap", (128, 32)), ("divprune+himap", (25, 13, 3)), ("sparsevlm", (133, 89, 49))):
    any_prompt = schedule(method, num_image_tokens=None)
    assert any_prompt.at(32, 576) == schedule(method)
    assert tuple(stage.keep for stage in any_prompt.at(32, 256).stages) == counts
    assert [s.num_image_tokens for s in any_prompt.segments(32, 256)] == [256, *counts]
  mixed = schedule("himap", num_image_tokens=None, keep=(300, 0.125))
  assert [s.num_image_tokens for s in mixed.segments(32, 256)] == [256, 256, 32]
  with pytest.raises(UserError, match="cannot keep 300 image tokens before layer 2: there are 256"):
    mixed.at(32, 256)
  for keep, message in (((0, 1), "cannot keep 0 image tokens"), ((0.5, 1.5), "above 0% and at most 100%, not 150")):
    with pytest.raises(UserError, match=message):
      schedule("himap", num_image_tokens=None, keep=keep)
  with pytest.raises(UserError, match="cannot prune before layer 32"):
    schedule("himap", num_image_tokens=None, prune_layers=(2, 32))


def test_methods_are_listed_by_name():
  assert list(methods.METHODS) == sorted(methods.METHODS)
  assert methods.parse("divprune+himap") == ["divprune", "himap"]


@pytest.mark.parametrize(
  "config, message",
  [
    (
      PruningConfig("himap"),
      "'himap' reads .* by cross-attention alone; methods that work: divprune, fastv, .*visipruner$",
    ),
    (PruningConfig("divprune+shortv"), "'shortv' reads .* by cross-attention alone"),
    (PruningConfig("fastv"), "before layer 2: it reads the attention of layers 0 to 1, and .* in layers 3, 8"),
    (PruningConfig("fastv", (5, 8), (9, 8)), "before layer 8: it reads the attention of layers 5 to 7"),
    (PruningConfig("pyramiddrop"), "before layer 16: it reads the attention of layers 16 to 16"),
    (PruningConfig("divprune+fastv", (0, 3)), "before layer 3: it reads the attention of layers 0 to 2"),
    (PruningConfig("fastv", (4, 9), (9, 8), restore=True), "RESTORE .* by cross-attention alone"),
  ],
)
def test_image_tokens_that_are_no_part_of_the_sequence(config, message):
  with pytest.raises(UserError, match=message):
    config.schedule(32, 576, {"features"}, (3, 8))
  assert PruningConfig("fastv", (4, 9), (9, 8)).schedule(32, 576, {"features"}, (3, 8)).num_caches == 3
  assert PruningConfig("random", (2,)).schedule(32, 576, {"features"}, (3, 8)).stages[0].keep == 144


@pytest.mark.parametrize("method", ["none", "shortv"])
def test_restore_needs_tokens_to_be_removed(method):
  with pytest.raises(UserError, match=f"RESTORE .* method '{method}' removes none"):
    PruningConfig(method, restore=True).schedule(32, 576)


def test_positions_are_lost_before_the_decoder_alone():
  with pytest.raises(UserError, match="method 'himap' keeps them"):
    PruningConfig("himap", keep_positions=True).schedule(32, 576)
  with pytest.raises(UserError, match="no positions to keep"):
    PruningConfig("divprune", keep_positions=True).schedule(32, 576, {"features"}, (3, 8))
  plain, own = (PruningConfig("divprune", keep_positions=kept).schedule(32) for kept in (False, True))
  assert own.keep_positions and not plain.keep_positions and own != plain and own.stages == plain.stages
  assert PruningConfig("divprune", restore=True, keep_positions=True).label == "divprune+positions+restore"


def test_restore_is_a_part_of_a_schedule():
  plain, restored = (PruningConfig("himap", restore=restore).schedule(32) for restore in (False, True))
  assert restored.restore and not plain.restore
  assert restored != plain and restored.stages == plain.stages
  assert restored.at(32, 256).restore and restored.with_counts((9, 3)).restore


def test_a_count_of_one_is_not_all():
  """They are equal as numbers, and must not share programs."""
  one, all_of_them = (PruningConfig("fastv", (2,), (keep,)).schedule(32) for keep in (1, 1.0))
  assert one != all_of_them
  assert [own.at(32, 16).stages[0].keep for own in (one, all_of_them)] == [1, 16]
  assert command.differences({"keep": [1], "seed": None}, {"keep": [1.0]}) == "keep was [1], now [1.0]"


def test_two_methods_whose_own_layers_are_the_same():
  with pytest.raises(UserError, match="'divprune.random' would prune before layers 0, 0 by default; name ascending"):
    PruningConfig("divprune+random").schedule(32)
  assert len(PruningConfig("divprune+random", (0, 4)).schedule(32).stages) == 2
