"""The original LLaVA layout (liuhaotian/llava-v1.5-*): its configuration and processor in the Hugging Face format.

Its config.json is that of the language model and names a CLIP tower, which is a separate checkpoint.
"""

import pathlib
from typing import Any

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.source import first_line, read_json

MODEL_TYPE = "llava"
IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
CHAT_TEMPLATE = (
  "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
  "{% else %}{{ message['role'] | upper + ': ' }}"
  "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
  "{% for item in message['content'] %}{% if item['type'] == 'text' %}"
  "{{ item['text'] + ('</s>' if message['role'] == 'assistant' else ' ') }}{% endif %}{% endfor %}{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_SELECT = {"patch": "default", "cls_patch": "full"}
_SUPPORTED = {
  "model_type": ("llava", "llava_llama"),
  "mm_projector_type": ("mlp2x_gelu",),
  "mm_vision_select_feature": tuple(_SELECT),
  "image_aspect_ratio": (None, "square", "pad"),
  "mm_patch_merge_type": (None, "flat"),
  "mm_use_im_start_end": (None, False),
}


def is_original(fields: dict[str, Any]) -> bool:
  """Whether a config.json is in LLaVA's original layout."""
  return "mm_vision_tower" in fields


def check(fields: dict[str, Any], where: str) -> None:
  """Raises `CheckpointError` at an unsupported setting; the message names the supported values."""
  for name, known in _SUPPORTED.items():
    value = fields.get(name, "patch" if name == "mm_vision_select_feature" else None)
    if value not in known:
      raise CheckpointError(
        f"{where}: {name} is {value!r}; supported in the original layout: "
        f"{' or '.join(repr(choice) for choice in known if choice is not None)}"
      )


def llava_fields(fields: dict[str, Any], tower: pathlib.Path, image_token_id: int) -> dict[str, Any]:
  """The fields of a Hugging Face LLaVA config.json; raises `CheckpointError` if the tower is not a CLIP model.

  Args:
    fields: the original config.json, checked.
    tower: directory with the CLIP tower's config.json.
    image_token_id: id of `<image>`.
  """
  import transformers

  vision = read_json(tower / "config.json")
  if vision.get("model_type") not in ("clip", "clip_vision_model"):
    raise CheckpointError(
      f"{tower}: model_type is {vision.get('model_type')!r}; the original layout needs a CLIP tower"
    )
  vision = vision.get("vision_config", vision) | {"model_type": "clip_vision_model"}
  known = transformers.LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling"}
  text = {name: value for name, value in fields.items() if name in known} | {"model_type": "llama"}
  patches = (vision.get("image_size", 224) // vision.get("patch_size", 32)) ** 2
  strategy = _SELECT[fields.get("mm_vision_select_feature", "patch")]
  return {
    "model_type": MODEL_TYPE,
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": text,
    "vision_config": vision,
    "image_token_index": image_token_id,
    "image_seq_length": patches + (strategy == "full"),
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": fields.get("mm_vision_select_layer", -2),
    "vision_feature_select_strategy": strategy,
    "tie_word_embeddings": fields.get("tie_word_embeddings", False),
  }


def tokenizer(source: pathlib.Path) -> Any:
  """The checkpoint's tokenizer with `<image>` and, if needed, `<pad>` added; `CheckpointError` if it is unreadable."""
  import transformers

  kind = read_json(source / "tokenizer_config.json").get("tokenizer_class", "LlamaTokenizer")
  loader = getattr(transformers, kind.removesuffix("Fast"), None) or transformers.PreTrainedTokenizerFast
  try:
    tokens = loader.from_pretrained(source, local_files_only=True)
  except Exception as error:
    raise CheckpointError(f"{source}: cannot read the tokenizer ({first_line(error)})") from error
  tokens.add_tokens([IMAGE_TOKEN], special_tokens=True)
  if tokens.pad_token is None:
    tokens.add_special_tokens({"pad_token": PAD_TOKEN})
  return tokens


def save_processor(
  target: pathlib.Path, tokens: Any, tower: pathlib.Path, fields: dict[str, Any], llava: dict[str, Any]
) -> None:
  """Writes the tokenizer and the tower's image processing, with LLaVA-1.5's padding to a square."""
  import transformers

  processing = read_json(tower / "preprocessor_config.json")
  settings = {name: value for name, value in processing.items() if not name.endswith(("_type", "_class"))}
  images = transformers.LlavaImageProcessorPil(**settings | {"do_pad": fields.get("image_aspect_ratio") == "pad"})
  transformers.LlavaProcessor(
    image_processor=images,
    tokenizer=tokens,
    patch_size=llava["vision_config"].get("patch_size", 32),
    vision_feature_select_strategy=llava["vision_feature_select_strategy"],
    image_token=IMAGE_TOKEN,
    num_additional_image_tokens=1,
    chat_template=CHAT_TEMPLATE,
  ).save_pretrained(target)
