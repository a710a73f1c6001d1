"""Chat templates, which are programs of the checkpoint's: they run in Jinja's sandbox, after they were tried."""

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from checkpoints_convert.messages import first_line
from himap_jax.errors import UserError

SECONDS, BYTES = 5, 1 << 30  # of a processor and of memory, that a template may take for short conversations
MAX_WAIT = 120  # seconds, on a machine with other work
OPTIONS = {"date_string": "26 Jul 2024"}  # what Llama's templates write where they do not know the day
TOO_MUCH = f"takes more than {SECONDS} s or {BYTES >> 30} GiB"
DEFAULT = "default"  # of several templates the one that is used
WRITES_THE_DAY = "writes the day of a question; name another prompt template"
_PROGRAM = pathlib.Path(__file__).with_name("try_template.py")


def check(templates: Any, where: str, special_tokens: Mapping[str, str]) -> None:
  """Raises `UserError` if a template does not parse or exceeds `SECONDS` or `BYTES`, which a process of its own finds out.

  It also refuses a template in use that writes the day and does not let `filled` name it: answers would then depend on
  the day.

  `special_tokens` are the tokenizer's, by the names that templates know.
  """
  for name, template in templates.items() if isinstance(templates, Mapping) else [(DEFAULT, templates)]:
    if template is not None:
      is_text, tokens = isinstance(template, str), tuple(special_tokens.items())
      if problem := _problem(template, tokens) if is_text else f"is not a text but {repr(template)[:80]}":
        if problem != WRITES_THE_DAY or name == DEFAULT:
          raise UserError(f"{where}: its chat template {problem}")


@functools.cache
def _problem(template: str, special_tokens: tuple[tuple[str, str], ...]) -> str:
  command = [sys.executable, "-I", str(_PROGRAM), str(SECONDS), str(BYTES)]
  given = json.dumps([template, dict(special_tokens) | OPTIONS], ensure_ascii=False).encode("utf-8", "replace")
  environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # others would take memory
  try:
    own = subprocess.run(command, input=given, capture_output=True, timeout=MAX_WAIT, env=environment)
  except subprocess.TimeoutExpired:
    return TOO_MUCH
  if own.returncode == 2:
    return f"does not parse ({own.stdout.decode().strip()})"
  if own.returncode == 3:
    return WRITES_THE_DAY
  return TOO_MUCH if own.returncode else ""


def filled(apply_chat_template: Callable[..., str], conversation: Sequence[Mapping[str, Any]]) -> str:
  """The prompt of a conversation, the same on every day; raises `UserError` if the template cannot hold it."""
  try:
    return apply_chat_template(conversation, add_generation_prompt=True, **OPTIONS)
  except Exception as error:  # of whatever type the template's own code raises
    raise UserError(f"the chat template cannot hold these messages ({first_line(error)})") from error
