"""Fills a chat template, in a process of its own: ends with 1 if it takes too much memory, with 2 and a message if it does
not parse, with 3 if it asks for the day, and is killed after too long.

echo '["TEMPLATE", {"eos_token": "</s>", "date_string": "26 Jul 2024"}]' | python -I try_template.py SECONDS BYTES
"""

import datetime
import json
import math
import resource
import sys
import time

import jinja2
from transformers.utils import chat_template_utils

TEXT = {"type": "text", "text": "?"}
QUESTION = {"role": "user", "content": [{"type": "image"}, TEXT]}
CONVERSATIONS = (
  [QUESTION],
  [{"role": "user", "content": [TEXT]}],
  [{"role": "system", "content": [TEXT]}, QUESTION, {"role": "assistant", "content": [TEXT]}, QUESTION],
  [
    {"role": "system", "content": "?"},
    QUESTION,
    {"role": "assistant", "content": "?"},
    {"role": "user", "content": "?"},
  ],
)


class Clock:
  """In the place of `datetime`: notes that it was asked."""

  def __init__(self):
    self.is_asked = False

  def now(self) -> datetime.datetime:
    self.is_asked = True
    return datetime.datetime(2024, 7, 26)


def main() -> int:
  """Fills the template of standard input under the limits of the command line; returns the exit status."""
  seconds, memory = map(int, sys.argv[1:])
  seconds += math.ceil(time.process_time())
  resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
  template, options = json.load(sys.stdin)
  chat_template_utils.datetime = clock = Clock()
  for conversation in CONVERSATIONS:
    try:
      chat_template_utils.render_jinja_template(
        [conversation], chat_template=template, add_generation_prompt=True, **options
      )
    except MemoryError:
      return 1
    except jinja2.TemplateSyntaxError as error:
      print(error.message)
      return 2
    except Exception:  # its own errors are told where it is used
      continue
  return 3 if clock.is_asked else 0


if __name__ == "__main__":
  sys.exit(main())
