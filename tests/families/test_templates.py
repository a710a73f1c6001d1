"""Chat templates and image processors that would exhaust time or memory, and those that fail."""

import dataclasses
import types

import pytest
import tiny_checkpoints

from himap_jax import checkpoint
from himap_jax.errors import UserError
from himap_jax.families import files, prompts, templates
from himap_jax.families.family import Message


@pytest.mark.parametrize(
  ("template", "message"),
  [
    ("{% for %}", r"^dir: its chat template does not parse \(.*\)$"),
    ("{{ 'a' * 10 ** 10 }}", r"takes more than 5 s or 1 GiB$"),
    (
      "{% if eos_token and strftime_now('%Y') %}{% for a in range(99999) %}{% for b in range(99999) %}"
      "{% endfor %}{% endfor %}{% endif %}",
      "takes more than 5 s or 1 GiB$",
    ),
    (3, "is not a text but 3"),
    ({"default": "{{ x }}", "tools": "{% if %}"}, "does not parse"),
    (
      "{% if date_string is defined %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
      "{% endif %}",
      "takes more than 5 s or 1 GiB$",
    ),
    (
      "{{ messages[0].x.y if messages[0].content is not string }}{% for a in range(99999) %}"
      "{% for b in range(99999) %}{% endfor %}{% endfor %}",
      "takes more than 5 s or 1 GiB$",
    ),
  ],
)
def test_refused(template, message):
  with pytest.raises(UserError, match=message):
    templates.check(template, "dir", {"eos_token": "</s>"})


@pytest.mark.parametrize(
  "template", [None, tiny_checkpoints.CHAT_TEMPLATE, "{{ 1 / 0 }}", "{% generation %}{{ messages }}{% endgeneration %}"]
)
def test_not_refused(template):
  """Errors of a template's own belong to the rows that raise them."""
  templates.check(template, "dir", {})


def test_an_error_of_any_type_is_the_users():
  with pytest.raises(UserError, match=r"the chat template cannot hold these messages \(division by zero\)"):
    templates.filled(lambda conversation, **options: 1 / 0, [])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"size": {"height": 10**6, "width": 10}}, "size has the height 1000000; needed: a whole number from 1 to 4,096"),
    ({"crop_size": {"height": 0}}, "crop_size has the height 0"),
    ({"size": {"shortest_edge": 10**9}, "merge_size": 2}, "size has the shortest_edge 1000000000"),
    ({"image_grid_pinpoints": [[336, 10**6]]}, "image_grid_pinpoints has the side 1000000"),
    ({"max_patches": 10**6}, "max_patches is 1000000"),
    ({"image_std": [0, 0.5, 0.5]}, r"image_std is \[0, 0.5, 0.5\]; needed: three numbers from 1e-06 to 1e\+06"),
    ({"image_std": [0.5, 0.5, -1]}, "image_std is"),
    ({"image_std": [0.5, 0.5]}, "image_std is"),
    ({"image_std": 0.5}, "image_std is 0.5"),
    ({"image_mean": [0.5, 0.5, float("nan")]}, r"image_mean is \[0.5, 0.5, nan\]; needed: three numbers from -1e\+06"),
    ({"image_mean": [0.5, 0.5, "0"]}, "image_mean is"),
  ],
)
def test_settings_of_image_processors(fields, message):
  files.check_image_processor(types.SimpleNamespace(size={"shortest_edge": 336}), "file")
  with pytest.raises(UserError, match=f"^file: {message}"):
    files.check_image_processor(types.SimpleNamespace(**fields), "file")


def test_a_size_that_is_none_is_the_files(checkpoints, tmp_path):
  opened = checkpoint.open_checkpoint(str(checkpoints("clip_mha").directory), cache_dir=tmp_path)
  own = types.SimpleNamespace(
    tokenizer=types.SimpleNamespace(chat_template=None, special_tokens_map={}),
    image_processor=types.SimpleNamespace(size=3),
  )
  with pytest.raises(UserError, match=r"cannot load the tokenizer and image processor \('int' object is not iterable"):
    dataclasses.replace(opened, processor=own).prompts()


# As Llama-3.2-Vision's: a system message is a text, other contents may be parts; the date of the day.
LLAMA_LIKE = (
  "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content']|trim %}{% set messages = messages[1:] %}"
  "{% else %}{% set system = '' %}{% endif %}{% if date_string is not defined %}"
  "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}Today: {{ date_string }}. {{ system }}|"
  "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
  "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
  "{% endif %}{% endfor %}"
)
# As LLaVA's: every content is parts.
OF_PARTS = "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
  ("template", "expected"),
  [(LLAMA_LIKE, "Today: 26 Jul 2024. Be [brief].|What is 2+2?"), (OF_PARTS, "Be [brief].What is 2+2?")],
)
def test_a_system_message_is_its_text_in_every_template(template, expected):
  found = files.ModelFiles(tiny_checkpoints.byte_tokenizer(), None, template, {})
  question = (Message("system", "Be [brief]."), Message("user", "What is 2+2?"))
  assert prompts.chat_prompt(found.apply_chat_template, question, 0) == expected


def test_templates_that_write_the_day():
  templates.check(LLAMA_LIKE, "dir", {})
  templates.check({"default": LLAMA_LIKE, "tools": "{{ strftime_now('%Y') }}"}, "dir", {})
  for template in ("{{ strftime_now('%Y') }}", "{% set date_string = strftime_now('%Y') %}{{ date_string }}"):
    with pytest.raises(UserError, match="^dir: its chat template writes the day of a question"):
      templates.check(template, "dir", {})
