"""The configuration, tokenizer and image processor of a checkpoint, read without transformers' processor, which may need torch."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints_convert.source import first_line, read_json
from himap_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelFiles:
  """What prompts need of a checkpoint besides its sizes.

  Attributes:
    tokenizer: of transformers.
    image_processor: of transformers, on Pillow.
    chat_template: None if the checkpoint has none.
    fields: of config.json.
  """

  tokenizer: Any
  image_processor: Any
  chat_template: str | None
  fields: Mapping[str, Any]

  def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
    """The text of a conversation, whose messages have a `role` and a `content` of parts."""
    options = dict(chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False)
    return self.tokenizer.apply_chat_template(list(conversation), **options)


def read_config(class_name: str, fields: Mapping[str, Any], where: str = "config.json") -> Any:
  """The fields of a `config.json` as a configuration of transformers, which completes them; raises `UserError`."""
  import transformers  # slow to import

  try:
    return getattr(transformers, class_name)(**{key: value for key, value in fields.items() if key != "model_type"})
  except Exception as error:  # transformers raises types of its own for invalid fields
    raise UserError(f"{where}: transformers cannot read it ({first_line(error)})") from error


def load(directory: pathlib.Path, image_processor: str, tokenizer: str = "AutoTokenizer") -> ModelFiles:
  """Loads a checkpoint's files by the named classes of transformers; raises `UserError` if that fails."""
  import transformers  # slow to import

  options = dict(local_files_only=True)
  try:
    text = getattr(transformers, tokenizer).from_pretrained(str(directory), **options)
    pictures = getattr(transformers, image_processor).from_pretrained(str(directory), **options)
  except (ValueError, OSError, KeyError, TypeError) as error:
    raise UserError(f"{directory}: cannot load the tokenizer and image processor ({first_line(error)})") from error
  template, older = text.chat_template, directory / "chat_template.json"
  if older.exists() and not (directory / "chat_template.jinja").exists():
    template = read_json(older).get("chat_template", template)
  return ModelFiles(text, pictures, template, read_json(directory / "config.json"))
