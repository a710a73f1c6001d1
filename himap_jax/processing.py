"""From a question and a picture to the model's inputs: prompt templates, tokens, pixels and static-shape batches.

Axes: B rows of a batch, S slots, N image tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from himap_jax.config import LlavaConfig
from himap_jax.images import MAX_PIXELS
from himap_jax.llava import Inputs

IMAGE_TAG = "<image>"
VICUNA_V1 = (
  "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
  "and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
)
DEFAULT_BUCKETS = (64, 128, 256, 512, 1024, 2048)
MAX_ASPECT_RATIO = 200


@dataclasses.dataclass(frozen=True)
class Example:
  """One preprocessed prompt.

  Attributes:
    before: token ids before the image.
    after: token ids after it.
    pixel_values: `[3, height, width]` float32.
  """

  before: tuple[int, ...]
  after: tuple[int, ...]
  pixel_values: np.ndarray

  @property
  def num_text_tokens(self) -> int:
    return len(self.before) + len(self.after)


class Processor:
  """Prepares prompts for one model.

  Attributes:
    image_shape: `(height, width)` in pixels of every preprocessed image.
    patch_grid: `(rows, columns)` of patches in such an image.
    num_image_tokens: N, image tokens of every prompt.
    buckets: padded text lengths, ascending.
  """

  def __init__(
    self,
    processor: Any,
    config: LlavaConfig,
    *,
    template: str = "chat",
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    max_new_tokens: int = 0,
  ):
    """Checks the settings against the model.

    Args:
      processor: the checkpoint's transformers processor.
      config: the model.
      template: `vicuna_v1`, `chat` (the checkpoint's own), or a literal with `<image>` and `{question}`.
      buckets: padded text lengths; the longest text that the model's context allows is added to them.
      max_new_tokens: tokens that must still fit into the context.

    Raises:
      ValueError: a template or buckets that cannot be used, an image processor whose pictures differ in size, or a
        context too small for an image.
    """
    self._processor = processor
    self._config = config
    self._template = _check_template(template, processor)
    self.image_shape = self._pixels(Image.new("RGB", (64, 48))).shape[1:]
    if self._pixels(Image.new("RGB", (48, 64))).shape[1:] != self.image_shape:
      raise ValueError("the checkpoint's image processor makes pictures of different sizes; a batch needs one size")
    self.patch_grid = tuple(side // config.vision.patch_size for side in self.image_shape)
    self.num_image_tokens = config.num_image_tokens(*self.image_shape)
    longest = config.text.max_position_embeddings - self.num_image_tokens - max_new_tokens
    if longest < 1:
      raise ValueError(
        f"the model's context of {config.text.max_position_embeddings} tokens does not hold an image of "
        f"{self.num_image_tokens} tokens and {max_new_tokens} new ones"
      )
    if not buckets or any(b < 1 for b in buckets) or sorted(set(buckets)) != list(buckets):
      raise ValueError(f"prompt buckets must be positive and ascending, not {','.join(map(str, buckets))}")
    self.buckets = (*(bucket for bucket in buckets if bucket < longest), longest)

  def prepare(self, image: Image.Image, question: str) -> Example:
    """Fills the template, tokenises it and preprocesses the picture.

    A question that has an `<image>` of its own says where the picture stands; otherwise the template does.

    Raises:
      ValueError: not exactly one `<image>` in the prompt, nothing after it, a prompt longer than the model's context, or a
        picture too long and narrow, or too large, to be resized.
    """
    text = self.prompt(question)
    count = text.count(IMAGE_TAG)
    if count != 1:
      raise ValueError(f"a prompt needs exactly one {IMAGE_TAG}, but this one has {count}")
    tokenizer = self._processor.tokenizer
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = list(tokenizer(text, add_special_tokens=not has_bos)["input_ids"])
    if ids.count(self._config.image_token_id) != 1:
      raise ValueError(
        f"the tokenizer turns {IMAGE_TAG} into {ids.count(self._config.image_token_id)} image tokens "
        f"(id {self._config.image_token_id}); the checkpoint's tokenizer and config.json disagree"
      )
    start = ids.index(self._config.image_token_id)
    if start == len(ids) - 1:
      raise ValueError(f"a prompt needs text after {IMAGE_TAG}: image tokens are kept by what that text attends to")
    if len(ids) - 1 > self.buckets[-1]:
      raise ValueError(
        f"the prompt has {len(ids) - 1} text tokens; with {self.num_image_tokens} image tokens the model's context "
        f"leaves room for {self.buckets[-1]}"
      )
    self._check_size(image)
    return Example(tuple(ids[:start]), tuple(ids[start + 1 :]), self._pixels(image))

  def prompt(self, question: str) -> str:
    """The text of a prompt."""
    own_image = IMAGE_TAG in question
    if self._template == "chat":
      content = [{"type": "text", "text": question}]
      if not own_image:
        content.insert(0, {"type": "image"})
      return self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    template = self._template
    if own_image:
      template = template.replace(IMAGE_TAG + "\n", "").replace(IMAGE_TAG, "")
    return template.replace("{question}", question)

  def bucket(self, example: Example) -> int:
    """The smallest bucket that holds an example's text."""
    return next(bucket for bucket in self.buckets if example.num_text_tokens <= bucket)

  def batch(self, examples: Sequence[Example], *, bucket: int, batch_size: int) -> Inputs:
    """Packs examples into arrays of a shape that depends on `bucket` and `batch_size` alone.

    Missing rows repeat the last example, or are blank where there is none.
    """
    filler = examples[-1] if examples else Example((), (0,), np.zeros((3, *self.image_shape), np.float32))
    rows = [*examples, *[filler] * (batch_size - len(examples))]
    tokens = np.zeros((batch_size, bucket + self.num_image_tokens), np.int32)
    for row, example in zip(tokens, rows, strict=True):
      ids = [*example.before, *[self._config.image_token_id] * self.num_image_tokens, *example.after]
      row[: len(ids)] = ids
    return Inputs(
      tokens=tokens,
      length=np.array([example.num_text_tokens + self.num_image_tokens for example in rows], np.int32),
      image_start=np.array([len(example.before) for example in rows], np.int32),
      pixel_values=np.stack([example.pixel_values for example in rows]),
    )

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of an answer, without special tokens and surrounding white space."""
    return self._processor.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

  def picture(self, example: Example) -> Image.Image:
    """The picture as the model sees it: resized, and cropped to whole patches."""
    mean, std = (
      np.asarray(values, np.float32)[:, None, None]
      for values in (self._processor.image_processor.image_mean, self._processor.image_processor.image_std)
    )
    pixels = np.clip((example.pixel_values * std + mean) * 255, 0, 255).round().astype(np.uint8)
    height, width = (count * self._config.vision.patch_size for count in self.patch_grid)
    return Image.fromarray(pixels[:, :height, :width].transpose(1, 2, 0))

  def _check_size(self, image: Image.Image) -> None:
    """Refuses what would fill the memory when its shortest side is scaled up, or when it is padded to a square."""
    shortest, longest = sorted(image.size)
    if longest > MAX_ASPECT_RATIO * shortest:
      raise ValueError(
        f"the picture has {image.width} x {image.height} pixels; one side may be at most {MAX_ASPECT_RATIO} "
        "times the other"
      )
    if getattr(self._processor.image_processor, "do_pad", False) and longest**2 > MAX_PIXELS:
      raise ValueError(
        f"the picture has {image.width} x {image.height} pixels; padded to a square it is above the limit of "
        f"{MAX_PIXELS:,}"
      )

  def _pixels(self, image: Image.Image) -> np.ndarray:
    return np.asarray(self._processor.image_processor(image, return_tensors="np")["pixel_values"][0], np.float32)


def _check_template(template: str, processor: Any) -> str:
  if template == "vicuna_v1":
    return VICUNA_V1
  if template == "chat":
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
      raise ValueError("the checkpoint has no chat template; use --prompt_template=vicuna_v1 or a literal one")
    return template
  if template.count(IMAGE_TAG) != 1 or template.count("{question}") != 1:
    raise ValueError(
      f"--prompt_template must be vicuna_v1, chat, or a text with one {IMAGE_TAG} and one {{question}}, "
      f"not {template!r}"
    )
  return template.replace("\\n", "\n")
