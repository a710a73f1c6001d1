"""LLaVA's original layout (liuhaotian/llava-v1.5-*, OpenGVLab/InternVL-Chat-ViT-6B-*) in the Hugging Face format.

Its config.json is that of the language model and names a tower, CLIP or InternViT, which is a separate checkpoint.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.json_files import read_json
from checkpoints_convert.messages import first_line

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

# InternVL's code builds the image processing of an InternViT itself, whatever the tower's own files say.
_INTERNVIT_SIDE = 336
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

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


class Tower(NamedTuple):
  """A vision tower's own checkpoint.

  Attributes:
    model_type: as in its config.json, a key of `names.TOWER_ENTRIES`.
    fields: a `vision_config` of transformers' LLaVA.
    processing: arguments of transformers' LLaVA image processor.
    side: of a preprocessed picture, in pixels.
  """

  directory: pathlib.Path
  model_type: str
  fields: Mapping[str, Any]
  processing: Mapping[str, Any]
  side: int


def open_tower(directory: pathlib.Path, name: str) -> Tower:
  """Reads the settings of a tower that was published as `name`; raises `CheckpointError` if it is not supported."""
  fields = read_json(directory / "config.json")
  model_type, vision = fields.get("model_type"), fields.get("vision_config", fields)
  if not isinstance(vision, dict):
    raise CheckpointError(f"{directory / 'config.json'}: vision_config is {repr(vision)[:80]}; needed: an object")
  for size in ("image_size", "patch_size"):
    if type(vision.get(size, 1)) is not int or vision.get(size, 1) < 1:
      raise CheckpointError(
        f"{directory / 'config.json'}: {size} is {repr(vision[size])[:80]}; needed: a whole number from 1"
      )
  if model_type in ("clip", "clip_vision_model"):
    fields = vision | {"model_type": "clip_vision_model"}
    processing = read_json(directory / "preprocessor_config.json")
    settings = {key: value for key, value in processing.items() if not key.endswith(("_type", "_class"))}
    return Tower(directory, model_type, fields, settings, fields.get("image_size", 224))
  if model_type == "intern_vit_6b":
    side = 448 if "448" in name else _INTERNVIT_SIDE
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return Tower(directory, model_type, _internvit_fields(fields), _IMAGENET | size, side)
  raise CheckpointError(
    f"{directory}: model_type is {model_type!r}; the original layout needs a CLIP or an InternViT tower "
    "(clip, clip_vision_model, intern_vit_6b)"
  )


def published_tower(name: str) -> str:
  """The Hub id of a tower that config.json names by a path on the authors' machine; other names are returned."""
  if re.search(r"intern_?vit[-_]?6b", name, re.IGNORECASE) and not name.startswith("OpenGVLab/"):
    return f"OpenGVLab/InternViT-6B-{448 if '448' in name else 224}px"
  return name


def _internvit_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
  same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
  same += ("layer_norm_eps", "image_size", "patch_size")
  return {
    "model_type": "internvl_vision",
    "use_qk_norm": fields.get("qk_normalization", True),
    "attention_bias": fields.get("qkv_bias", False),
    "norm_type": fields.get("norm_type", "rms_norm"),
    **{name: fields[name] for name in same if name in fields},
  }


def llava_fields(fields: Mapping[str, Any], tower: Tower, image_token_id: int) -> dict[str, Any]:
  """The fields of a Hugging Face LLaVA config.json.

  Args:
    fields: the original config.json, checked.
    image_token_id: id of `<image>`.
  """
  import transformers

  known = transformers.LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling"}
  text = {name: value for name, value in fields.items() if name in known} | {"model_type": "llama"}
  patches = (tower.side // tower.fields.get("patch_size", 32)) ** 2
  strategy = _SELECT[fields.get("mm_vision_select_feature", "patch")]
  return {
    "model_type": MODEL_TYPE,
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": text,
    "vision_config": dict(tower.fields),
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

  kind = read_json(source / "tokenizer_config.json").get("tokenizer_class") or "LlamaTokenizer"
  try:
    loader = getattr(transformers, kind.removesuffix("Fast"), None)
    if not (isinstance(loader, type) and issubclass(loader, transformers.PreTrainedTokenizerBase)):
      loader = transformers.PreTrainedTokenizerFast
    tokens = loader.from_pretrained(source, local_files_only=True)
    tokens.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokens.pad_token is None:
      tokens.add_special_tokens({"pad_token": PAD_TOKEN})
  except Exception as error:
    raise CheckpointError(f"{source}: cannot read the tokenizer ({first_line(error)})") from error
  return tokens


def save_processor(target: pathlib.Path, tokens: Any, tower: Tower, fields: Mapping[str, Any]) -> None:
  """Writes the tokenizer and the tower's image processing, with LLaVA-1.5's padding to a square.

  `fields` is the original config.json.
  """
  import transformers

  do_pad = fields.get("image_aspect_ratio") == "pad"
  try:
    image_processor = transformers.LlavaImageProcessorPil(**{**tower.processing, "do_pad": do_pad})
  except Exception as error:
    raise CheckpointError(f"{tower.directory}: cannot use its image processor ({first_line(error)})") from error
  try:
    transformers.LlavaProcessor(
      image_processor=image_processor,
      tokenizer=tokens,
      patch_size=tower.fields.get("patch_size", 32),
      vision_feature_select_strategy=_SELECT[fields.get("mm_vision_select_feature", "patch")],
      image_token=IMAGE_TOKEN,
      num_additional_image_tokens=1,
      chat_template=CHAT_TEMPLATE,
    ).save_pretrained(target)
  except OSError:  # of the disk
    raise
  except Exception as error:
    raise CheckpointError(f"{tokens.name_or_path}: cannot use the tokenizer ({first_line(error)})") from error
