"""Fills a chat template, in a process of its own: ends with 1 if it takes too much memory, with 2 and a message if it does
not parse, and is killed after too long.

echo '["TEMPLATE", {"eos_token": "</s>"}]' | python -I try_template.py SECONDS BYTES
"""

import json
import math
import resource
import sys
import time

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

TEXT = {"type": "text", "text": "?"}
QUESTION = {"role": "user", "content": [{"type": "image"}, TEXT]}
CONVERSATIONS = (
  [QUESTION],
  [{"role": "user", "content": [TEXT]}],
  [{"role": "system", "content": [TEXT]}, QUESTION, {"role": "assistant", "content": [TEXT]}, QUESTION],
)


def main() -> int:
  """Fills the template of standard input under the limits of the command line; returns the exit status."""
  seconds, memory = map(int, sys.argv[1:])
  seconds += math.ceil(time.process_time())
  resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
  template, special_tokens = json.load(sys.stdin)
  for conversation in CONVERSATIONS:
    try:
      render_jinja_template([conversation], chat_template=template, add_generation_prompt=True, **special_tokens)
    except MemoryError:
      return 1
    except jinja2.TemplateSyntaxError as error:
      print(error.message)
      return 2
    except Exception:  # its own errors are told where it is used
      continue
  return 0


if __name__ == "__main__":
  sys.exit(main())
