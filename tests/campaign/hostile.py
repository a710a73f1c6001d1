"""Hostile checkpoints, opened as a user would: nothing in them runs, and nothing outside of them is read."""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable
from typing import Any

import commands
import numpy as np
from campaign import bounded
from campaign.trials import Part, Trial
from PIL import Image
from safetensors.numpy import load_file, save, save_file

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.json_files import write_json
from himap_jax.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FAMILIES = ("llava", "llava_next", "internvl", "smolvlm", "gemma3", "mllama", "qwen", "qwen2_5_vl")
SECRET = "the secret outside of the checkpoint"
# Tensors that no model reads: LLaVA takes its features from the layer before the tower's last.
UNUSED = ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.", "transformer.rotary_emb.inv_freq")

LOOPS = (
  "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
  "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
  "{{ 9 ** 9 ** 9 }}",
  "{% if eos_token %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
  "{% if strftime_now('%Y') %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
  "{% if date_string %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
  "{{ 1 / 0 if messages[0].content is not string }}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
  "{% endfor %}",
  "{% if messages[0].content | length > 1 %}{{ 1 / 0 }}{% endif %}"
  "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
)
BLOATS = (
  "{{ 'a' * 10 ** 10 }}",
  "{{ range(10 ** 9) | list }}",
  "{% set own = namespace(x='aaaaaaaa') %}{% for n in range(60) %}{% set own.x = own.x + own.x %}{% endfor %}",
  "{{ 'a' | center(10 ** 10) }}",
  "{{ '%10000000000d' % 1 }}",
)
ESCAPES = (
  "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  "{{ cycler.__init__.__globals__.os.system('touch SENTINEL') }}",
  "{{ lipsum.__globals__['os'].popen('touch SENTINEL').read() }}",
  "{{ (messages | attr('__class__')).__base__ }}",
  "{{ '{0.__class__.__mro__}'.format(messages) }}",
  "{% include 'SECRET' %}",
)
BROKEN = ("{% for %}", "{{ 1 / 0 }}", "{{ messages[99].x.y }}", "{{ raise_exception('no') }}", "{% if %}{{")
ABSURD = {
  **dict.fromkeys(("num_hidden_layers", "depth", "layers"), (10**9, 0, -1)),
  **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"), (10**9, 0, -1, 1.5)),
  **dict.fromkeys(("image_size", "patch_size"), (10**9, 0, -7, "7")),
  "num_key_value_heads": (0, 3, 10**9),
}
PICTURE_SIZES = ("size", "crop_size", "max_image_size", "max_patches", "max_image_tiles", "patch_size", "merge_size")


@dataclasses.dataclass(frozen=True)
class Place:
  """A checkpoint under attack, and what must not be touched.

  Attributes:
    sentinel: a file that code of the checkpoint would make.
    secret: a file outside.
  """

  directory: pathlib.Path
  sentinel: pathlib.Path
  secret: pathlib.Path

  @property
  def code(self) -> str:
    """Python that makes the sentinel."""
    return f"open({str(self.sentinel)!r}, 'w').close()"

  def change(self, file: str, **fields: Any) -> None:
    """Replaces fields of a JSON file, which need not exist."""
    path = self.directory / file
    before = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, before | fields)


class Evil:
  """A pickle of it runs code."""

  def __init__(self, code: str):
    self.code = code

  def __reduce__(self) -> tuple:
    return exec, (self.code,)


def _remote_code(random: np.random.Generator, place: Place) -> str:
  for name in ("evil", "configuration_evil", "modeling_evil", "processing_evil", "tokenization_evil"):
    (place.directory / f"{name}.py").write_text(f"{place.code}\nclass Evil: pass\n")
  names = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
  file = str(random.choice([*(name for name in names if (place.directory / name).exists()), "processor_config.json"]))
  classes = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
  own: dict[str, Any] = {"auto_map": dict.fromkeys(classes, "evil.Evil")}
  if random.random() < 0.5:
    own |= {
      "tokenizer_class": "Evil",
      "processor_class": "Evil",
      "image_processor_type": "Evil",
      "trust_remote_code": True,
    }
  if file == "processor_config.json" and not (place.directory / file).exists():
    own |= {"processor_class": "Evil"}
  place.change(file, **own)
  return "remote code"


def _pickles(random: np.random.Generator, place: Place) -> str:
  import torch

  named = str(random.choice([WEIGHTS, "pytorch_model.bin", "x.safetensors", "optimizer.bin"]))
  path, evil, form = place.directory / named, Evil(place.code), str(random.choice(["pickle", "zip", "tar"]))
  (place.directory / WEIGHTS).unlink()
  if form == "zip":
    torch.save({"a": torch.zeros(2), "b": evil}, path)
  else:
    path.write_bytes(pickle.dumps({"a": evil}))
  if form == "tar":
    shutil.move(path, path.with_suffix(".raw"))
    with tarfile.open(path, "w") as archive:
      archive.add(path.with_suffix(".raw"), "pickle")
  return f"pickle in {form}"


def _shard_paths(random: np.random.Generator, place: Place) -> str:
  names = list(load_file(place.directory / WEIGHTS))
  outside = place.secret.with_name(WEIGHTS)
  shutil.move(place.directory / WEIGHTS, outside)
  shard = str(
    random.choice(["../outside/model.safetensors", str(outside), f"a/../../outside/{WEIGHTS}", "..", "", "~"])
  )
  write_json(place.directory / INDEX, {"weight_map": dict.fromkeys(names, shard)})
  return "shard outside"


def _links(random: np.random.Generator, place: Place) -> str:
  files = sorted(path for path in place.directory.iterdir() if path.is_file())
  path = files[random.integers(len(files))]
  outside = place.secret.with_name(path.name)
  shutil.move(path, outside)
  path.symlink_to(outside if random.random() < 0.5 else pathlib.Path("../outside", path.name))
  return "link outside"


def _stray_link(random: np.random.Generator, place: Place) -> str:
  path = place.directory / str(random.choice(["notes.txt", "params/0", "additional_chat_templates/a.jinja"]))
  path.parent.mkdir(exist_ok=True)
  path.symlink_to(place.secret)
  return "link outside"


def _pipe(random: np.random.Generator, place: Place) -> str:
  path = place.directory / str(random.choice(["notes.txt", "config.json", "tokenizer.json", WEIGHTS]))
  path.unlink(missing_ok=True)
  os.mkfifo(path)
  return "pipe"


def _template(random: np.random.Generator, place: Place) -> str:
  kind, texts = [("loops", LOOPS), ("bloats", BLOATS), ("escapes", ESCAPES), ("broken", BROKEN)][random.integers(4)]
  text = (
    texts[random.integers(len(texts))].replace("SENTINEL", str(place.sentinel)).replace("SECRET", str(place.secret))
  )
  if (place.directory / "chat_template.jinja").exists() or random.random() < 0.7:
    (place.directory / "chat_template.jinja").write_text(text)
  else:
    place.change("tokenizer_config.json", chat_template=text)
  is_used = (
    json.loads((place.directory / "config.json").read_text())["model_type"] != "qwen"
  )  # whose prompts are our own
  return f"template {kind}" if is_used else "unused template"


def _sizes(random: np.random.Generator, place: Place) -> str:
  fields = json.loads((place.directory / "config.json").read_text())
  parts = [fields, *(fields[name] for name in ("text_config", "vision_config", "visual") if name in fields)]
  found = [(part, name) for part in parts for name in ABSURD if name in part]
  part, name = found[random.integers(len(found))]
  part[name] = ABSURD[name][random.integers(len(ABSURD[name]))]
  write_json(place.directory / "config.json", fields)
  return "sizes in config.json"


def _picture_sizes(random: np.random.Generator, place: Place) -> str:
  """Absurd sizes in the file that has the image processor's, where there is one."""
  path = place.directory / "preprocessor_config.json"
  if not path.exists():
    path = place.directory / "processor_config.json"
  if not path.exists():
    return _sizes(random, place)
  fields = json.loads(path.read_text())
  own = fields.get("image_processor", fields)
  name = str(random.choice([name for name in PICTURE_SIZES if own.get(name) is not None]))
  absurd = int(random.choice([10**10, 0, -1]))
  own[name] = dict.fromkeys(own[name], absurd) if isinstance(own[name], dict) else absurd
  write_json(path, fields)
  return "sizes of pictures"


def _values(random: np.random.Generator, place: Place) -> str:
  tensors = load_file(place.directory / WEIGHTS)
  name = str(random.choice([name for name in _used(tensors) if tensors[name].dtype == np.float32]))
  tensor = tensors[name].copy()
  tensor.reshape(-1)[random.integers(tensor.size)] = random.choice([np.nan, np.inf, -np.inf])
  save_file(tensors | {name: tensor}, place.directory / WEIGHTS)
  return "NaN or infinite weights"


def _used(tensors: Iterable[str]) -> list[str]:
  return sorted(name for name in tensors if not name.startswith(UNUSED))


def _damage(random: np.random.Generator, place: Place) -> str:
  path = place.directory / WEIGHTS
  data, tensors = path.read_bytes(), load_file(path)
  size = 8 + int.from_bytes(data[:8], "little")
  header = json.loads(data[8:size])
  name, other = (str(own) for own in random.choice(_used(tensors), 2, replace=False))
  kind = str(random.choice(["truncated", "overlapping", "beyond", "twice", "missing", "shape", "dtype", "unsafe"]))
  if kind == "truncated":
    path.write_bytes(
      data[: random.integers(size)] if random.random() < 0.5 else data[: random.integers(size, len(data))]
    )
  elif kind in ("overlapping", "beyond"):
    begin, end = header[name]["data_offsets"]
    shift = (
      header[other]["data_offsets"][0] - begin if kind == "overlapping" else int(random.choice([len(data), 2**60]))
    )
    header[name]["data_offsets"] = [begin + shift, end + shift]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[size:])
  elif kind == "twice":
    (place.directory / "model-2.safetensors").write_bytes(save({name: tensors[name]}))
    path.rename(place.directory / "model-1.safetensors")
  elif kind == "missing":
    save_file({own: tensor for own, tensor in tensors.items() if own != name}, path)
  elif kind == "shape":
    save_file(tensors | {name: np.zeros((2, *tensors[name].shape), np.float32)}, path)
  elif kind == "dtype":
    save_file(tensors | {name: tensors[name].astype(random.choice([np.int32, np.int8, np.float64, np.bool_]))}, path)
  else:
    save_file(tensors | {"../../x": tensors[name]}, path)
  return f"weights: {kind}"


def _hub_cache(random: np.random.Generator, place: Place) -> str:
  """No attack: the links of the hub's cache are followed."""
  del random
  blobs = place.directory.parent.parent / "blobs"
  blobs.mkdir()
  for path in list(place.directory.iterdir()):
    shutil.move(path, blobs / path.name)
    path.symlink_to(pathlib.Path("../../blobs", path.name))
  return "hub cache"


ATTACKS: tuple[Callable[[np.random.Generator, Place], str], ...] = (_remote_code, _pickles, _shard_paths, _links)
ATTACKS += (_stray_link, _pipe, _template, _template, _sizes, _picture_sizes, _values, _damage, _damage, _hub_cache)
REFUSED = (
  "pickle",
  "shard",
  "link",
  "pipe",
  "template loops",
  "template bloats",
  "template broken",
  "sizes",
  "NaN",
  "weights:",
)


def prepare(shared: pathlib.Path) -> Trial:
  from campaign import models  # with torch, which those who try the inputs do without

  for name in FAMILIES:
    models.made(shared, name)
  return bounded.trial(functools.partial(_attempts, shared / "models"), 1, shared)


def _attempts(checkpoints: pathlib.Path, random: np.random.Generator, directory: pathlib.Path, count: int) -> Any:
  found: collections.Counter[str] = collections.Counter()
  commands.allow_torch()  # which makes and reads pickles
  for _ in range(count):
    place = Place(
      directory / "cache" / "snapshots" / "0", directory / "ran", directory / "cache" / "snapshots" / "outside" / "s"
    )
    shutil.copytree(checkpoints / str(random.choice(FAMILIES)), place.directory)
    place.secret.parent.mkdir()
    place.secret.write_text(SECRET)
    attack = ATTACKS[random.integers(len(ATTACKS))](random, place)
    _watch(place)
    allow_pickle = bool(random.random() < 0.5)
    outcome, message = bounded.in_time(_open, place.directory, directory / "our_cache", allow_pickle)
    assert not place.sentinel.exists(), (attack, "ran")
    assert SECRET not in message and "\n" not in message, (attack, message)
    copies = [path for path in (directory / "our_cache").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in copies), attack
    assert outcome == "refused" or not attack.startswith(REFUSED) or "optimizer" in message, (attack, outcome)
    assert outcome == "loaded" or attack != "hub cache", message
    found[f"{attack}: {outcome}"] += 1
  return found


def _watch(place: Place) -> None:
  """From here on this process opens no socket and nothing beside the checkpoint, and starts no program but our own."""
  outside = str(place.secret.parent)

  def hook(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.posix_spawn"):
      raise bounded.Violation(f"{event}{arguments}")
    if (
      event == "open"
      and isinstance(arguments[0], str)
      and str(pathlib.Path(arguments[0]).resolve()).startswith(outside)
    ):
      raise bounded.Violation(f"opened {arguments[0]}")
    if event == "subprocess.Popen" and arguments[0] not in (sys.executable, "ldconfig", "/sbin/ldconfig"):
      raise bounded.Violation(f"{event}{arguments}")

  sys.addaudithook(hook)


def _open(directory: pathlib.Path, cache_dir: pathlib.Path, allow_pickle: bool) -> tuple[str, str]:
  """Reads everything of a checkpoint, and all of its weights."""
  import jax.numpy as jnp

  from himap_jax import checkpoint

  try:
    opened = checkpoint.open_checkpoint(str(directory), cache_dir=cache_dir, allow_pickle=allow_pickle)
    opened.prompts().prepare([Image.new("RGB", (60, 50))], "What is it?")
    opened.restore(dtype=jnp.float32)
  except (UserError, CheckpointError) as error:
    return "refused", str(error)
  return "loaded", ""


PART = Part(
  "Hostile checkpoints run nothing, read nothing outside, connect to nothing, and are refused in one line.", prepare
)
