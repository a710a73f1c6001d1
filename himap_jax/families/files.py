"""The configuration, tokenizer and image processor of a checkpoint, read without transformers' processor, which may need torch."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.json_files import read_json
from checkpoints_convert.messages import first_line
from himap_jax.errors import UserError

MAX_SIDE, MAX_AREA = 4096, 1 << 25  # pixels, of a preprocessed picture or tile
MAX_TILES = 256  # of a picture; and the largest side of a patch
NORMALISATION = {"image_mean": (-1e6, 1e6), "image_std": (1e-6, 1e6)}  # bounds, beyond which pixels may be infinite


@dataclasses.dataclass(frozen=True)
class PromptFiles:
  """What prompts need of a checkpoint besides its sizes.

  Attributes:
    tokenizer: of transformers.
    image_processor: of transformers, on Pillow.
  """

  tokenizer: Any
  image_processor: Any


@dataclasses.dataclass(frozen=True)
class ModelFiles(PromptFiles):
  """As `PromptFiles`, with a chat template that need not be the tokenizer's.

  Attributes:
    chat_template: None if the checkpoint has none.
    fields: of config.json.
  """

  chat_template: str | None
  fields: Mapping[str, Any]

  def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text of a conversation, whose messages have a `role` and a `content` of parts; options as of transformers."""
    return self.tokenizer.apply_chat_template(
      list(conversation), chat_template=self.chat_template, tokenize=False, **options
    )


def read_config(class_name: str, fields: Mapping[str, Any], where: str = "config.json") -> Any:
  """The fields of a `config.json` as a configuration of transformers, which completes them; raises `UserError`."""
  import transformers  # slow to import

  with _readable_by_transformers(where):
    return getattr(transformers, class_name)(**{key: value for key, value in fields.items() if key != "model_type"})


def complete_fields(config: Any, where: str = "config.json") -> dict[str, Any]:
  """All fields of a configuration of transformers as they lie in a `config.json`; raises `UserError`."""
  with _readable_by_transformers(where):
    return json.loads(config.to_json_string(use_diff=False))


@contextlib.contextmanager
def _readable_by_transformers(where: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # transformers raises types of its own for invalid fields
    raise UserError(f"{where}: transformers cannot read it ({first_line(error.__cause__ or error)})") from error


@contextlib.contextmanager
def unusable(directory: pathlib.Path) -> Iterator[None]:
  """Turns errors of the libraries that read a checkpoint's files, which are of any type, into a `UserError`."""
  try:
    yield
  except (UserError, CheckpointError):
    raise
  except Exception as error:
    raise UserError(f"{directory}: cannot load the tokenizer and image processor ({first_line(error)})") from error


def check_image_processor(images: Any, where: str) -> None:
  """Raises `UserError` for sizes of pictures, or numbers of tiles, that would exhaust memory, or for pixels that are not finite."""
  for name in ("size", "crop_size", "max_image_size"):
    for side, value in dict(getattr(images, name, None) or {}).items():
      is_area = side.endswith("_edge") and hasattr(images, "merge_size")  # of Qwen, whose edges are numbers of pixels
      _check_number(value, MAX_AREA if is_area else MAX_SIDE, f"{where}: {name} has the {side}")
  for sides in getattr(images, "image_grid_pinpoints", None) or ():
    for value in sides if isinstance(sides, list | tuple) else [sides]:
      _check_number(value, MAX_SIDE, f"{where}: image_grid_pinpoints has the side")
  for name in ("max_patches", "max_image_tiles", "patch_size", "merge_size", "temporal_patch_size"):
    _check_number(getattr(images, name, None), MAX_TILES, f"{where}: {name} is")
  for name, (least, most) in NORMALISATION.items():
    values = getattr(images, name, None)
    if values is not None and not _are_three(values, least, most):
      raise UserError(f"{where}: {name} is {repr(values)[:80]}; needed: three numbers from {least:,g} to {most:,g}")


def _check_number(value: Any, most: int, what: str) -> None:
  if value is not None and not (type(value) is int and 1 <= value <= most):
    raise UserError(f"{what} {repr(value)[:80]}; needed: a whole number from 1 to {most:,}")


def _are_three(values: Any, least: float, most: float) -> bool:
  is_three = isinstance(values, list | tuple) and len(values) == 3
  return is_three and all(type(value) in (int, float) and least <= value <= most for value in values)


def check_image_token(tokenizer: Any, token: str, image_token_id: int, where: str) -> None:
  """Raises `UserError` unless the token that stands for image tokens has the id in config.json."""
  found = tokenizer.convert_tokens_to_ids(token)
  if found != image_token_id:
    raise UserError(
      f"{where}: the image token has the id {image_token_id} in config.json, but {token} has "
      f"{'none' if found is None else found} in the tokenizer; the checkpoint's tokenizer and config.json disagree"
    )


def load(directory: pathlib.Path, image_processor: str, tokenizer: str = "AutoTokenizer") -> ModelFiles:
  """Loads a checkpoint's files by the named classes of transformers; raises `UserError` if that fails."""
  import transformers  # slow to import

  options = dict(local_files_only=True)
  with unusable(directory):
    text = getattr(transformers, tokenizer).from_pretrained(str(directory), **options)
    pictures = getattr(transformers, image_processor).from_pretrained(str(directory), **options)
  template, older = text.chat_template, directory / "chat_template.json"
  if older.exists() and not (directory / "chat_template.jinja").exists():
    template = read_json(older).get("chat_template", template)
  return ModelFiles(text, pictures, template, read_json(directory / "config.json"))
