"""Fills a chat template, in a process of its own: ends with 1 if it takes too much memory, with 2 and a message if it does
not parse, and is killed after too long.

echo TEMPLATE | python -I try_template.py SECONDS BYTES
"""

import contextlib
import resource
import sys

import jinja2.ext
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
  """The block `{% generation %}`, which transformers knows, and of which the text is its content."""

  tags = {"generation"}  # noqa: RUF012  as jinja2 has it

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> int:
  """Fills the template of standard input under the limits of the command line; returns the exit status."""
  seconds, memory = map(int, sys.argv[1:])
  resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
  extensions = [Generation, jinja2.ext.loopcontrols]
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=extensions
  )
  parts = [{"type": "image"}, {"type": "text", "text": "?"}]
  try:
    template = environment.from_string(sys.stdin.read())
    for content in (parts, "?"):
      with contextlib.suppress(jinja2.TemplateError, TypeError, AttributeError, LookupError, ValueError):
        template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True, bos_token="")
  except MemoryError:
    return 1
  except jinja2.TemplateSyntaxError as error:
    print(error.message)
    return 2
  except Exception:
    return 0  # its own errors are told where it is used
  return 0


if __name__ == "__main__":
  sys.exit(main())
