"""The text of prompts and answers, for all families."""

from collections.abc import Callable, Sequence
from typing import Any

from himap_jax.errors import UserError, check_text
from himap_jax.families import templates
from himap_jax.families.family import Message, Question, texts_of

IMAGE_TAG = "<image>"


def messages_of(question: Question, num_pictures: int) -> list[Message]:
  """The messages of a conversation, with one `<image>` for every picture.

  Without any, all are put before the text of the first message of the user.

  Raises:
    UserError: another number of `<image>` than of pictures.
  """
  messages = [Message("user", question)] if isinstance(question, str) else list(question)
  count = sum(message.text.count(IMAGE_TAG) for message in messages)
  if not count and num_pictures:
    first = next((index for index, message in enumerate(messages) if message.role == "user"), 0)
    messages[first] = Message(messages[first].role, IMAGE_TAG * num_pictures + messages[first].text)
  elif count != num_pictures:
    pictures = number_of_pictures(num_pictures)
    raise UserError(f"a prompt needs one {IMAGE_TAG} for each picture, but this one has {count} for {pictures}")
  return messages


def number_of_pictures(count: int) -> str:
  """The number with its noun, for messages."""
  return "1 picture" if count == 1 else f"{count} pictures"


def content_parts(text: str) -> list[dict[str, str]]:
  """A message's content for chat templates: its text in parts, with a part for each `<image>`."""
  parts = []
  for number, piece in enumerate(text.split(IMAGE_TAG)):
    parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": piece}] * (piece != "")
  return parts or [{"type": "text", "text": ""}]


def chat_prompt(apply_chat_template: Callable[..., str], question: Question, num_pictures: int) -> str:
  """The prompt by a chat template, with a part for each picture; raises `UserError` if it cannot hold the messages."""
  messages = messages_of(question, num_pictures)
  conversation = [{"role": message.role, "content": content_parts(message.text)} for message in messages]
  prompt = templates.filled(apply_chat_template, conversation)
  # Some templates, such as Llama's, take a system message as a text, and write parts as Python does.
  as_text = [
    own | {"content": message.text} if str(own["content"]) in prompt else own
    for own, message in zip(conversation, messages, strict=True)
  ]
  return prompt if as_text == conversation else templates.filled(apply_chat_template, as_text)


def fill(template: str, question: Question, num_pictures: int) -> str:
  """Puts a question into a template whose `<image>`, with the line break after it, is repeated for every picture.

  `<image>` in the question replaces those of the template. Raises `UserError` for a conversation of several messages,
  or a number of `<image>` that is not that of the pictures.
  """
  if not isinstance(question, str):
    if [message.role for message in question] != ["user"]:
      raise UserError("a conversation of several messages needs a chat template: --prompt_template=chat")
    question = question[0].text
  tag = IMAGE_TAG + "\n" if IMAGE_TAG + "\n" in template else IMAGE_TAG
  template = template.replace(tag, "" if IMAGE_TAG in question else tag * num_pictures)
  text = template.replace("{question}", question)
  messages_of([Message("user", text)], num_pictures)
  return text


def literal_template(template: str, *names: str) -> str:
  """A template given as text, with `\\n` for line breaks; raises `UserError`, which lists `names`, if it is unusable."""
  if template.count(IMAGE_TAG) != 1 or template.count("{question}") != 1:
    raise UserError(
      f"--prompt_template must be {', '.join(names)}, or a text with one {IMAGE_TAG} and one {{question}}, "
      f"not {template!r}"
    )
  check_text("--prompt_template", template)
  return template.replace("\\n", "\n")


def refuse_tokens(question: Question, tokens: Sequence[str]) -> None:
  """Raises `UserError` for a question that holds tokens which stand for pictures."""
  if any(token in text for token in tokens for text in texts_of(question)):
    raise UserError(f"a question may not hold {', '.join(tokens)}; {IMAGE_TAG} stands for the picture")


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
  """Token ids of a prompt, with one beginning of sequence if the tokenizer has one."""
  has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
  return tokenizer(text, add_special_tokens=not has_bos)["input_ids"]


def answer_text(tokenizer: Any, tokens: Sequence[int]) -> str:
  """The text of an answer, without special tokens and surrounding white space."""
  return tokenizer.decode(list(tokens), skip_special_tokens=True).strip()
