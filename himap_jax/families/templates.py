"""Chat templates, which are programs of the checkpoint's: they run in Jinja's sandbox, after they were tried."""

import functools
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from checkpoints_convert.source import first_line
from himap_jax.errors import UserError

SECONDS, BYTES = 5, 1 << 30  # that a template may take for a short conversation
_PROGRAM = pathlib.Path(__file__).with_name("try_template.py")


def check(templates: str | Mapping[str, str] | None, where: str) -> None:
  """Raises `UserError` if a template takes more than `SECONDS` or `BYTES`, which a process of its own finds out."""
  for template in templates.values() if isinstance(templates, Mapping) else [templates]:
    if template is not None and not (isinstance(template, str) and _is_bounded(template)):
      raise UserError(f"{where}: its chat template takes more than {SECONDS} s or {BYTES >> 30} GiB, or is no text")


@functools.cache
def _is_bounded(template: str) -> bool:
  command = [sys.executable, "-I", str(_PROGRAM), str(SECONDS), str(BYTES)]
  try:
    own = subprocess.run(command, input=template.encode("utf-8", "replace"), capture_output=True, timeout=4 * SECONDS)
  except subprocess.TimeoutExpired:
    return False
  return own.returncode == 0


def filled(apply_chat_template: Callable[..., str], conversation: Sequence[Mapping[str, Any]], **options: Any) -> str:
  """The prompt of a conversation; raises `UserError` if the template cannot hold it."""
  try:
    return apply_chat_template(conversation, add_generation_prompt=True, **options)
  except Exception as error:  # of whatever type the template's own code raises
    raise UserError(f"the chat template cannot hold these messages ({first_line(error)})") from error
