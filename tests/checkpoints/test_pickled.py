"""Pickled weights: the numbers of their safetensors form in as little memory, only where they are allowed, and no code."""

import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile

import commands
import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl import flags
from absl.testing import flagsaver
from huggingface_hub.utils import filter_repo_objects
from layouts import WEIGHTS, assert_same_trees, convert_to, flat_params, make_original, refuses
from peak_memory import WATCHED, widen
from safetensors.torch import load_file, save_file

from checkpoints_convert import pickle_reader, shards
from experiments.shared import study
from himap_jax import UserError, checkpoint
from himap_jax.run import job
from himap_jax.run.config import RunConfig
from himap_jax.run.flags import config_from_flags

pytestmark = pytest.mark.usefixtures("cache")
ROOT = pathlib.Path(__file__).parents[2]
SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
EXTRA = r"pip install 'himap_jax\[pickled\]'"


class Payload:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mknod, (str(self.path),)


def single(directory, tensors):
  torch.save(tensors, directory / SINGLE)
  torch.save({"model.mm_projector.0.weight": torch.zeros(1)}, directory / "mm_projector.bin")  # of an earlier training


def sharded(directory, tensors, num_shards=3):
  """Shards with an index, beside a file that it does not name."""
  weight_map = {
    name: f"pytorch_model-{index % num_shards + 1:05d}-of-{num_shards:05d}.bin" for index, name in enumerate(tensors)
  }
  for file in set(weight_map.values()):
    torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
  (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  torch.save({"model.mm_projector.0.weight": torch.zeros(1)}, directory / "mm_projector.bin")


def loose(directory, tensors):
  """Files of any name, beside one without tensors and those of a training's state, which hold code."""
  is_projector = {name: "projector" in name for name in tensors}
  for file, wanted in (("language.bin", False), ("mm_projector.bin", True)):
    torch.save({name: value for name, value in tensors.items() if is_projector[name] is wanted}, directory / file)
  torch.save({"steps": 3}, directory / "notes.bin")
  for name in ("training_args.bin", "optimizer.bin"):
    torch.save(Payload(directory / "ran"), directory / name)


FORMS = (single, sharded, loose)


def pickle_weights(directory, form=single, *, change=lambda tensors: tensors):
  """Changes the weights of a checkpoint and pickles them instead of their safetensors."""
  form(directory, change(load_file(directory / WEIGHTS)))
  (directory / WEIGHTS).unlink()
  return directory


def as_pickled(directory, target, *arguments, **options):
  """A copy of a checkpoint whose weights are pickled: see `pickle_weights`."""
  return pickle_weights(shutil.copytree(directory, target), *arguments, **options)


def cast(dtype):
  return lambda tensors: {name: value.to(dtype) for name, value in tensors.items()}


@pytest.fixture(scope="module")
def clip(checkpoints):
  return checkpoints("clip_mha").directory


@pytest.fixture(scope="module")
def expected(clip, cache):
  return flat_params(clip)


@pytest.fixture
def pickled(clip, tmp_path):
  return as_pickled(clip, tmp_path / "source")


class TestNumbers:
  @pytest.mark.sampled
  @pytest.mark.parametrize("form", FORMS)
  def test_read_directly_on_a_mesh_and_converted(self, clip, expected, tmp_path, form):
    directory = as_pickled(clip, tmp_path / "source", form)
    mesh = checkpoint.sharding.make_mesh(data=2, tensor=4)
    assert_same_trees(flat_params(directory, allow_pickle=True), expected)
    assert_same_trees(flat_params(directory, allow_pickle=True, mesh=mesh), expected)
    target = convert_to(directory, tmp_path / "target", allow_pickle=True)
    assert_same_trees(flat_params(target), expected)
    copied = {path.name for path in clip.iterdir()} - {WEIGHTS}
    assert {path.name for path in target.iterdir()} == copied | {"himap_jax.json", "params"}
    assert not (directory / "ran").exists()

  @pytest.mark.sampled
  @pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
  @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
  def test_stored_dtypes(self, clip, tmp_path, stored, dtype):
    plain = shutil.copytree(clip, tmp_path / "plain")
    save_file(cast(stored)(load_file(clip / WEIGHTS)), plain / WEIGHTS)
    directory = as_pickled(plain, tmp_path / "source")
    assert_same_trees(flat_params(directory, dtype, allow_pickle=True), flat_params(plain, dtype))
    name = str(stored).removeprefix("torch.")
    target = convert_to(directory, tmp_path / "target", allow_pickle=True)
    assert json.loads((target / "himap_jax.json").read_text())["dtypes"] == [name]

  @pytest.mark.sampled
  @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
  def test_strides_and_shared_storages(self, clip, tmp_path, stored):
    """Transposed, reversed by a stride, a part of a larger storage, a Parameter, and two names of one tensor."""
    base = cast(stored)(load_file(clip / WEIGHTS))
    norms = [name for name in base if name.startswith("language_model") and name.endswith("layernorm.weight")]
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"

    def change(tensors):
      assert len(norms) == 12
      base[head] = base[embedding]
      together = torch.stack([base[name] for name in norms], dim=1)
      return {
        **{
          name: torch.nn.Parameter(value.T.contiguous().T if value.ndim == 2 else value) for name, value in base.items()
        },
        **{name: together[:, column] for column, name in enumerate(norms)},
        head: base[embedding],
        embedding: base[embedding],
      }

    plain = shutil.copytree(clip, tmp_path / "plain")
    directory = as_pickled(clip, tmp_path / "source", change=change)
    save_file({name: value.clone() for name, value in base.items()}, plain / WEIGHTS)
    mesh = checkpoint.sharding.make_mesh(data=2, tensor=4)
    for options in ({}, {"mesh": mesh}):
      assert_same_trees(flat_params(directory, allow_pickle=True, **options), flat_params(plain, **options))
    target = convert_to(directory, tmp_path / "target", allow_pickle=True)
    assert_same_trees(flat_params(target), flat_params(plain))

  @pytest.mark.parametrize("tower_inside", [False, True])
  def test_original_layout(self, clip, expected, tmp_path, tower_inside):
    directory = make_original(clip, tmp_path / "source", tower_inside=tower_inside)
    pickle_weights(directory, sharded)
    pickle_weights(directory / "clip")
    assert_same_trees(flat_params(convert_to(directory, tmp_path / "target", allow_pickle=True)), expected)
    refuses(directory, tmp_path / "other", rf"only pickled weights \({INDEX}, .*--allow_pickle")

  def test_a_pickled_tower_of_safetensors(self, clip, tmp_path):
    directory = make_original(clip, tmp_path / "source", tower_inside=False)
    pickle_weights(directory / "clip")
    refuses(directory, tmp_path / "other", r"clip: only pickled weights \(.*--allow_pickle")

  def test_a_part_is_a_copy_of_its_own(self, clip, pickled):
    """It outlives the mapping, and JAX may keep it."""
    tensor = next(one for one in shards.read_headers(pickled, allow_pickle=True).values() if one.shape == (48, 96))
    part = tensor.reader()(np.s_[4:7, ::2])
    assert part.flags.owndata and part.flags.c_contiguous and part.base is None
    np.testing.assert_array_equal(part, load_file(clip / WEIGHTS)[tensor.name][4:7, ::2].numpy())


class TestChoice:
  def test_safetensors_first(self, clip, expected, tmp_path, monkeypatch):
    directory = shutil.copytree(clip, tmp_path / "source")
    torch.save(Payload(tmp_path / "ran"), directory / SINGLE)
    monkeypatch.setattr(pickle_reader, "_map", lambda *_: pytest.fail("read a pickle"))
    before = checkpoint.open_checkpoint(str(directory), allow_pickle=True).digest()
    assert_same_trees(flat_params(directory, allow_pickle=True), expected)
    (directory / SINGLE).unlink()
    assert checkpoint.open_checkpoint(str(directory)).digest() == before

  def test_the_digest_is_of_the_files_that_are_read(self, clip, tmp_path):
    directory = as_pickled(clip, tmp_path / "source", sharded)
    first = checkpoint.open_checkpoint(str(directory), allow_pickle=True).digest()
    target = tmp_path / "target"
    (directory / "mm_projector.bin").unlink()
    assert checkpoint.open_checkpoint(str(directory), allow_pickle=True).digest() == first
    fingerprints = []
    for _ in range(2):
      convert_to(directory, target, allow_pickle=True)
      fingerprints.append(json.loads((target / "himap_jax.json").read_text())["fingerprint"])
      shutil.rmtree(target)
      path = directory / "pytorch_model-00002-of-00003.bin"
      tensors = torch.load(path)
      torch.save({name: value / 2 for name, value in tensors.items()}, path)
    assert fingerprints[0] == first != fingerprints[1]
    assert checkpoint.open_checkpoint(str(directory), allow_pickle=True).digest() not in fingerprints

  def test_a_file_that_is_replaced_is_read_anew(self, pickled, expected):
    flat_params(pickled, allow_pickle=True)
    torch.save({name: value + 1 for name, value in torch.load(pickled / SINGLE).items()}, pickled / "new")
    os.replace(pickled / "new", pickled / SINGLE)
    loaded = flat_params(pickled, allow_pickle=True)
    np.testing.assert_array_equal(np.asarray(loaded["lm_head/weight"]), np.asarray(expected["lm_head/weight"]) + 1)


REFUSED = "could hold code and are read with --allow_pickle only.*" + EXTRA


class TestCode:
  """Nothing in a pickle is run."""

  @pytest.fixture
  def ran(self, tmp_path):
    """The file that a payload would create."""
    return tmp_path / "ran"

  @pytest.mark.parametrize("form", ["among tensors", "instead of tensors", "not zipped", "bare"])
  def test_a_payload(self, clip, pickled, ran, tmp_path, form, monkeypatch):
    path, tensors = pickled / SINGLE, torch.load(pickled / SINGLE)
    if form == "bare":
      path.write_bytes(pickle.dumps(Payload(ran)))
    else:
      content = Payload(ran) if form == "instead of tensors" else tensors | {"x": Payload(ran)}
      torch.save(content, path, _use_new_zipfile_serialization=form != "not zipped")
    refuses(pickled, tmp_path / "target", REFUSED)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    what = "format before 1.6" if form in ("bare", "not zipped") else "its pickle asks for posix.mknod"
    message = refuses(pickled, tmp_path / "target", what, allow_pickle=True)
    assert str(path) in message and not ran.exists()
    (pickle.loads(path.read_bytes()) if form == "bare" else torch.load(path, weights_only=False))
    assert ran.exists()  # so the payload would have worked

  def test_a_payload_in_the_tower(self, clip, ran, tmp_path):
    directory = make_original(clip, tmp_path / "source", tower_inside=False)
    (directory / "clip" / WEIGHTS).unlink()
    torch.save(Payload(ran), directory / "clip" / SINGLE)
    refuses(directory, tmp_path / "target", "its pickle asks for posix.mknod", allow_pickle=True)
    assert not ran.exists()


def rezip(path, change, compression=zipfile.ZIP_STORED):
  """Writes an archive anew with its records changed; None drops one."""
  with zipfile.ZipFile(path) as archive:
    records = {name: archive.read(name) for name in archive.namelist()}
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, content in records.items():
      if (changed := change(name, content)) is not None:
        archive.writestr(name, changed)


class TestRefusals:
  @pytest.mark.parametrize("form", FORMS)
  def test_not_allowed(self, clip, tmp_path, form):
    directory = as_pickled(clip, tmp_path / "source", form)
    message = refuses(directory, tmp_path / "target", REFUSED)
    assert "only pickled weights (" in message and "optimizer" not in message

  def test_no_weights(self, clip, tmp_path):
    directory = shutil.copytree(clip, tmp_path / "source")
    (directory / WEIGHTS).rename(directory / "consolidated.00.pth")
    refuses(directory, tmp_path / "target", "no safetensors.*" + EXTRA)
    refuses(directory, tmp_path / "target", r"no weights, neither \*.safetensors nor \*.bin", allow_pickle=True)

  @pytest.mark.parametrize(
    "size, reason", [(0, "no archive"), (1, "no archive"), (2000, "truncated"), (-1, "truncated"), (-200, "truncated")]
  )
  def test_truncated(self, pickled, tmp_path, size, reason):
    whole = (pickled / SINGLE).read_bytes()
    (pickled / SINGLE).write_bytes(whole[:size])
    message = refuses(pickled, tmp_path / "target", rf"{SINGLE}: not a complete file of torch.save", allow_pickle=True)
    assert reason in message and "download it again" in message

  @pytest.mark.parametrize(
    "content, reason",
    [
      (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
      (b"GGUF" + bytes(64), "no archive"),
      (b"cposix\nsystem\n(S'true'\ntR.", "no archive"),
      (b"PK\x03\x04" + bytes(64), "truncated"),
    ],
  )
  def test_other_files(self, pickled, tmp_path, content, reason):
    (pickled / SINGLE).write_bytes(content)
    refuses(pickled, tmp_path / "target", reason, allow_pickle=True)

  def test_a_directory_in_the_place_of_a_file(self, clip, tmp_path):
    directory = shutil.copytree(clip, tmp_path / "source")
    (directory / WEIGHTS).unlink()
    (directory / "weights.bin").mkdir()
    refuses(directory, tmp_path / "target", "weights.bin: cannot be read", allow_pickle=True)

  @pytest.mark.parametrize(
    "change",
    [
      lambda name, content: b"\x80\x02garbage" if name.endswith("data.pkl") else content,
      lambda name, content: content[:-40] if name.endswith("data.pkl") else content,
      lambda name, content: None if name.endswith("data.pkl") else content,
      lambda name, content: None if name.endswith("data/3") else content,
    ],
  )
  def test_damaged_inside(self, pickled, tmp_path, change):
    rezip(pickled / SINGLE, change)
    refuses(pickled, tmp_path / "target", "not a readable file of torch.save|asks for more than", allow_pickle=True)

  def test_compressed(self, pickled, tmp_path):
    rezip(pickled / SINGLE, lambda name, content: content, zipfile.ZIP_DEFLATED)
    refuses(pickled, tmp_path / "target", "a compressed archive", allow_pickle=True)

  def test_the_format_before_1_6(self, pickled, tmp_path):
    torch.save(torch.load(pickled / SINGLE), pickled / SINGLE, _use_new_zipfile_serialization=False)
    refuses(pickled, tmp_path / "target", r"before 1\.6, which cannot be mapped.*save it again", allow_pickle=True)

  def test_missing_shard(self, clip, tmp_path):
    directory = as_pickled(clip, tmp_path / "source", sharded)
    (directory / "pytorch_model-00002-of-00003.bin").unlink()
    refuses(directory, tmp_path / "target", r"1 of 3 shards are missing \(pytorch_model-00002-of", allow_pickle=True)

  def test_an_index_that_names_absent_tensors(self, clip, tmp_path):
    directory = as_pickled(clip, tmp_path / "source", sharded)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["other"] = "pytorch_model-00002-of-00003.bin"
    (directory / INDEX).write_text(json.dumps(index))
    refuses(directory, tmp_path / "target", rf"{INDEX}: 1 tensors are not in the shard.*\(other\)", allow_pickle=True)
    (directory / INDEX).write_text("{}")
    refuses(directory, tmp_path / "target", f"{INDEX}: not an index of shards", allow_pickle=True)

  def test_a_tensor_in_two_files(self, pickled, tmp_path):
    shutil.copy(pickled / SINGLE, pickled / "a.bin")
    (pickled / SINGLE).rename(pickled / "b.bin")
    (pickled / "mm_projector.bin").unlink()
    refuses(pickled, tmp_path / "target", r"b\.bin: tensor .* is also in a\.bin", allow_pickle=True)

  @pytest.mark.parametrize(
    "content", [[torch.ones(2)], {"model": {"x": torch.ones(2)}}, {3: torch.ones(2)}, torch.ones(2)]
  )
  def test_no_tensors_by_name(self, pickled, tmp_path, content):
    torch.save(content, pickled / SINGLE)
    refuses(pickled, tmp_path / "target", "not those of the model.* missing", allow_pickle=True)

  @pytest.mark.parametrize(
    "change, what",
    [
      (lambda weight: weight.to_sparse(), "is not a plain array"),
      (lambda weight: weight.to("meta"), "is not a plain array"),
      (lambda weight: weight.double(), "is F64"),
      (lambda weight: weight[:-1], r"is \[271, 48\], expected \[272, 48\]"),
    ],
  )
  def test_tensors_of_another_kind(self, clip, tmp_path, change, what):
    name = "language_model.lm_head.weight"
    directory = as_pickled(clip, tmp_path / "source", change=lambda tensors: tensors | {name: change(tensors[name])})
    refuses(directory, tmp_path / "target", f"{name} {what}", allow_pickle=True)


class Hub:
  """A hub with one repository, and a cache of it; `asked` are the files of each download."""

  def __init__(self, repository, cache):
    self.repository, self.cache, self.asked = repository, cache, []

  def snapshot_download(self, name, *, allow_patterns, ignore_patterns=None):
    assert name == "owner/name"
    files = [str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()]
    wanted = list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
    self.asked += wanted
    for file in wanted:
      (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(self.repository / file, self.cache / file)
    return str(self.cache)


class TestHub:
  @pytest.fixture
  def hub(self, clip, tmp_path, monkeypatch):
    """A repository with safetensors, pickled weights and a training's state."""
    repository = shutil.copytree(clip, tmp_path / "repository")
    loose(repository, load_file(clip / WEIGHTS))
    shutil.copytree(repository, repository / "checkpoint-5")
    hub = Hub(repository, tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub

  def test_safetensors_alone(self, hub, expected):
    assert_same_trees(flat_params("owner/name", allow_pickle=True), expected)
    assert not [file for file in hub.asked if file.endswith(".bin")]

  def test_pickled_weights_without_the_flag(self, hub):
    (hub.repository / WEIGHTS).unlink()
    (hub.repository / "checkpoint-5" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"no safetensors.*{REFUSED}"):
      checkpoint.open_checkpoint("owner/name")
    assert not [file for file in hub.asked if file.endswith(".bin")]

  def test_pickled_weights_with_the_flag(self, hub, expected):
    (hub.repository / WEIGHTS).unlink()
    assert_same_trees(flat_params("owner/name", allow_pickle=True), expected)
    pickled = [file for file in hub.asked if file.endswith(".bin")]
    assert sorted(pickled) == ["language.bin", "mm_projector.bin", "notes.bin"]

  @pytest.mark.parametrize("tower_inside", [False, True])
  def test_the_tower_of_the_original_layout(self, clip, expected, tmp_path, monkeypatch, tower_inside):
    directory = make_original(clip, tmp_path / "source", tower_inside=tower_inside)
    as_pickled(directory / "clip", tmp_path / "tower")
    hub = Hub(tmp_path / "tower", tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    target = convert_to(directory, tmp_path / "target", vision_tower="owner/name", allow_pickle=True)
    assert_same_trees(flat_params(target), expected)
    assert (SINGLE in hub.asked) is not tower_inside


def run_with_torch(*arguments, **options):
  environment = os.environ | {"PYTHONPATH": ""}
  return subprocess.run(
    [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, **options
  )


WITHOUT_TORCH = """
import sys
import jax.numpy as jnp
from himap_jax import checkpoint
checkpoint.load(sys.argv[1], dtype=jnp.float32, allow_pickle=True)  # safetensors
try:
  checkpoint.load(sys.argv[2], dtype=jnp.float32, allow_pickle=True)
except ValueError as error:
  print(error)
"""


def test_without_torch(clip, pickled):
  assert commands.Command(WITHOUT_TORCH, clip, pickled).succeeded() == (
    f"{pickled / SINGLE}: pickled weights need PyTorch, in the extra `pickled`: pip install 'himap_jax[pickled]'\n"
  )


class TestFlags:
  def test_convert(self, pickled, expected, tmp_path):
    arguments = ["himap_jax.convert", f"--source={pickled}", f"--target={tmp_path / 'target'}"]
    refused = commands.Command(*arguments)
    _, errors = refused.communicate()
    assert refused.process.exitcode == 2 and "--allow_pickle" in errors.strip().splitlines()[-1]
    done = run_with_torch("-m", *arguments, "--allow_pickle")
    assert done.returncode == 0, done.stderr
    assert_same_trees(flat_params(tmp_path / "target"), expected)

  @pytest.fixture
  def opened(self, monkeypatch):
    """The names of checkpoints that were asked for, and whether pickles were allowed."""
    asked = []

    def refuse(name, *, allow_pickle):
      asked.append((name, allow_pickle))
      raise UserError("enough")

    monkeypatch.setattr(checkpoint, "open_checkpoint", refuse)
    return asked

  def test_run(self, opened, tmp_path):
    (tmp_path / "p").write_text('{"id": 1, "image": "x.png", "question": "Why?"}\n')
    for given in ([], ["--allow_pickle"]):
      with flagsaver.flagsaver():
        paths = [f"--prompts={tmp_path / 'p'}", f"--output={tmp_path / 'o'}", "--compilation_cache_dir="]
        flags.FLAGS(["run", "--checkpoint=name", *paths, *given])
        config = config_from_flags()
      assert isinstance(config, RunConfig)
      with pytest.raises(UserError, match="enough"):
        job.run(config)
    assert opened == [("name", False), ("name", True)]

  def test_studies(self, opened, tmp_path, monkeypatch):
    values = flags.FlagValues()
    for name in ("DEFINE_string", "DEFINE_enum", "DEFINE_integer", "DEFINE_list", "DEFINE_bool"):
      define = getattr(flags, name)
      monkeypatch.setattr(
        flags, name, lambda *args, define=define, **options: define(*args, flag_values=values, **options)
      )
    monkeypatch.setattr(flags, "FLAGS", values)
    study.define_shared_flags(question_set=str(tmp_path / "questions.jsonl"), checkpoint="name")
    monkeypatch.setattr(study.question_sets, "load", lambda *_, **__: [])
    values(["study", "--allow_pickle", f"--workdir={tmp_path}", f"--output={tmp_path}", "--compilation_cache_dir="])
    with pytest.raises(UserError, match="enough"):
      study.load_subject()
    assert opened == [("name", True)]


MEASURED = f"""{WATCHED}
import sys
import jax, jax.numpy as jnp, torch, transformers
from checkpoints_convert.convert import convert, open_source
from himap_jax import checkpoint
jax.block_until_ready(jnp.zeros(3))
checkpoint.open_checkpoint(sys.argv[3])
before = start()
loaded = checkpoint.load(sys.argv[1], dtype=jnp.bfloat16, allow_pickle=True)
print(peak[0] - before - sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.model.params)))
before = start()
cache = checkpoint.default_cache_dir()
convert(open_source(sys.argv[1], allow_pickle=True), sys.argv[2], checkpoint.describe, cache_dir=cache)
print(peak[0] - before)
print(open("/proc/self/maps").read().count("pytorch_model"))
"""


@pytest.mark.sampled(of="memory")
def test_memory_is_bounded_by_tensors_and_not_by_the_model(clip, tmp_path):
  """Four layers of 3 x 25 MB in bfloat16, in two shards."""
  directory = tmp_path / "source"
  shapes = widen(clip, directory, num_layers=4)
  tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
  sharded(directory, tensors, num_shards=2)
  total, largest = sum(value.nbytes for value in tensors.values()), max(value.nbytes for value in tensors.values())
  del tensors
  assert total > 330e6 and largest < 26e6
  done = run_with_torch("-c", MEASURED, str(directory), str(tmp_path / "target"), str(clip), check=True)
  loading, converting, maps = map(int, done.stdout.split())
  assert loading < 3 * largest + (20 << 20)  # as for safetensors, and below
  assert converting < 0.6 * total
  assert maps <= 2  # of one shard
