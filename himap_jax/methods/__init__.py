"""The pruning methods, one module each; a module's name is the method's, its `METHOD` the description."""

import importlib
import pkgutil

from himap_jax.method import Method
from himap_jax.schedule import Schedule, Stage

METHODS: dict[str, Method] = {
  module.name: importlib.import_module(f"{__name__}.{module.name}").METHOD for module in pkgutil.iter_modules(__path__)
}


def parse(method: str) -> list[str]:
  """The names in `a` or `a+b`.

  Raises:
    ValueError: one is not in `METHODS`.
  """
  names = method.split("+")
  for name in names:
    if name not in METHODS:
      raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
  return names


def build_schedule(
  method: str,
  *,
  num_layers: int,
  num_image_tokens: int,
  has_class_token: bool = True,
  prune_layers: tuple[int, ...] | None = None,
  keep: tuple[int | float, ...] | None = None,
) -> Schedule:
  """Builds and checks the schedule of a method for a model.

  Args:
    method: a name in `METHODS`, or two joined by `+`: one before the decoder, one inside.
    num_layers: the decoder's layers.
    num_image_tokens: image tokens before pruning.
    has_class_token: whether the tower has a class token.
    prune_layers: layers to prune before, one a stage, 0 being before the decoder (for a method that freezes, the layers
      in which image tokens are not updated); the method's own when None.
    keep: image tokens to keep at each stage, a count (int) or a share of the image's tokens (float in (0, 1], rounded to
      the nearest count, at least one); the method's own when None. Of two methods, the second one's own shares are of
      what the first keeps.

  Raises:
    ValueError: an unknown method, a wrong number of layers or counts, or values that the model cannot run.
  """
  entries = [_entry(name, has_class_token) for name in parse(method)]
  if len(entries) > 1:
    _check_combination(method, entries)
  if prune_layers is None:
    prune_layers = sum((_of_depth(entry.prune_layers, num_layers) for entry in entries), ())
  if any(entry.freezes for entry in entries):
    if keep is not None:
      raise ValueError(f"method {method!r} keeps every image token, so it takes no keep")
    schedule = Schedule(frozen_layers=tuple(sorted(prune_layers)))
  else:
    counts = (
      _own_counts(entries, num_layers, num_image_tokens)
      if keep is None
      else [_count(k, num_image_tokens) for k in keep]
    )
    criteria = _criteria(method, entries, len(prune_layers))
    _check_layers(method, entries, prune_layers)
    if len(counts) != len(criteria):
      raise ValueError(f"method {method!r} has {len(criteria)} stages, but keep has {len(counts)} values")
    schedule = Schedule(tuple(Stage(*stage) for stage in zip(prune_layers, counts, criteria, strict=True)))
  schedule.segments(num_layers, num_image_tokens)
  return schedule


def _entry(name: str, has_class_token: bool) -> Method:
  if METHODS[name].needs_class_attention and not has_class_token:
    others = [known for known, entry in METHODS.items() if not entry.needs_class_attention]
    raise ValueError(
      f"method {name!r} reads the attention of the tower's class token, and this model's tower has none; "
      f"methods that work: {', '.join(others)}"
    )
  return METHODS[name]


def _check_combination(method: str, entries: list[Method]) -> None:
  first, second = entries[0], entries[1]
  can_be = first.criteria and first.acts != "inside" and second.criteria and second.acts != "before"
  if len(entries) > 2 or not can_be:
    before = [name for name, entry in METHODS.items() if entry.criteria and entry.acts != "inside"]
    raise ValueError(
      f"method {method!r}: two methods combine as one that acts before the decoder ({', '.join(before)}) + one that "
      "prunes inside it"
    )


def _check_layers(method: str, entries: list[Method], prune_layers: tuple[int, ...]) -> None:
  for index, layer in enumerate(prune_layers):
    acts = entries[0 if index == 0 else -1].acts
    if acts == "before" and layer != 0:
      raise ValueError(f"method {method!r} acts before the decoder: its prune_layers can only be 0, not {layer}")
    if acts == "inside" and layer == 0:
      raise ValueError(f"method {method!r} cannot prune before layer 0: it needs the attention of the layer before")


def _of_depth(value, num_layers: int) -> tuple:
  return value(num_layers) if callable(value) else value


def _criteria(method: str, entries: list[Method], num_stages: int) -> list:
  """The criterion of every stage; a method's single one serves as many stages as there are."""
  criteria = list(entries[0].criteria) if len(entries) > 1 else []
  own = entries[-1].criteria
  num_own = num_stages - len(criteria)
  if (len(own) != 1 and num_own != len(own)) or num_own < len(own):
    raise ValueError(
      f"method {method!r} has {len(criteria) + len(own)} stages, but prune_layers has {num_stages} values"
    )
  return criteria + list(own if len(own) == num_own else own * num_own)


def _own_counts(entries: list[Method], num_layers: int, num_image_tokens: int) -> list[int]:
  counts = []
  for entry in entries:
    entering = counts[-1] if counts else num_image_tokens
    counts += [_count(share, entering) for share in _of_depth(entry.keep, num_layers)]
  return counts


def _count(keep: int | float, num_image_tokens: int) -> int:
  if isinstance(keep, int):
    return keep
  if not 0 < keep <= 1:
    raise ValueError(f"a share of image tokens to keep must be above 0% and at most 100%, not {keep:.4%}")
  return max(1, round(keep * num_image_tokens))
