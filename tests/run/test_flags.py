"""The command's flags: their defaults, what they refuse, and what they become."""

import contextlib
import json
import pathlib

import pytest
from absl import flags
from absl.testing import flagsaver

import himap_jax
from himap_jax import Sampling, UserError
from himap_jax.run import __main__ as command
from himap_jax.run.flags import config_from_flags
from himap_jax.run.prompts import Columns

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def parsed(*arguments):
  with flagsaver.flagsaver():
    flags.FLAGS(["run", *arguments])
    yield


NEEDED = ("--prompts=p", "--output=o")


class TestFlags:
  def test_defaults(self):
    with parsed(*NEEDED):
      config = config_from_flags()
    assert config.pruning == himap_jax.PruningConfig("himap", None, None, ())
    assert (config.checkpoint, config.dtype, config.generation.sampling) == ("demo", "bfloat16", Sampling())
    assert config.resume and not config.strict and config.compilation_cache_dir.endswith("/compiled")
    hash(config)  # is hashable

  def test_values(self):
    with parsed(*NEEDED, "--keep=50%, 12.5%", "--prune_layers=2,8", "--emit=kept,tokens", "--prompt_buckets=8,16",
                    "--temperature=0.5", "--top_p=0.9", "--compilation_cache_dir=", "--noresume",
                    "--method_parameters=threshold:0.7", "--restore"):  # fmt: skip
      config = config_from_flags()
    assert (config.pruning.keep, config.pruning.prune_layers) == ((0.5, 0.125), (2, 8))
    assert (config.pruning.parameters, config.inputs.prompt_buckets) == ((("threshold", 0.7),), (8, 16))
    assert (config.emit, config.generation.sampling) == (frozenset({"kept", "tokens"}), Sampling(0.5, 0.9))
    assert (config.compilation_cache_dir, config.resume) == ("", False)
    assert config.pruning.restore and config.pruning.label == "himap+restore"

  def test_columns(self):
    with parsed(*NEEDED, "--columns=image:img, question:q,id:qid", "--split=A/test"):
      config = config_from_flags()
    assert config.columns == Columns(("qid",), ("img",), ("q",), ("messages",)) and config.split == "A/test"

  def test_a_schedule_from_a_file(self, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"method": "himap", "prune_layers": [3, 9], "keep": [200, 50], "lost": 0.1}))
    with parsed(*NEEDED, f"--schedule={path}"):
      config = config_from_flags()
    assert config.pruning == himap_jax.PruningConfig("himap", (3, 9), (200, 50))
    with (
      parsed(*NEEDED, f"--schedule={path}", "--keep=5,3"),
      pytest.raises(UserError, match="takes the place of --keep"),
    ):
      config_from_flags()
    for fields in ({"method": "himap", "keep": [200, 50]}, {"method": None, "prune_layers": [3, 9], "keep": [200, 50]}):
      path.write_text(json.dumps(fields))
      with (
        parsed(*NEEDED, f"--schedule={path}"),
        pytest.raises(UserError, match="not an object with method, prune_layers"),
      ):
        config_from_flags()

  @pytest.mark.parametrize(
    "name, values, wanted",
    [
      ("keep", [200, 0.25], None),
      ("keep", [1.0, 1], None),
      ("keep", [288.7, 72], "counts such as 288 or shares such as 0.5"),
      ("keep", [float("inf"), 50], "counts"),
      ("keep", [float("nan"), 50], "counts"),
      ("keep", [0.0, 50], "counts"),
      ("keep", [-0.5, 50], "counts"),
      ("keep", [True, 50], "counts"),
      ("keep", ["50%", 50], "counts"),
      ("keep", "72", "counts"),
      ("keep", {"72": 1}, "counts"),
      ("keep", None, "counts"),
      ("prune_layers", "28", "layers such as 2"),
      ("prune_layers", [2.0, 8], "layers"),
      ("prune_layers", [False, 8], "layers"),
      ("prune_layers", 2, "layers"),
    ],
  )
  def test_numbers_of_a_schedule_from_a_file(self, name, values, wanted, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"method": "himap", "prune_layers": [3, 9], "keep": [200, 50]} | {name: values}))
    with parsed(*NEEDED, f"--schedule={path}"):
      if wanted is None:
        keep = config_from_flags().pruning.keep
        assert keep == tuple(values) and list(map(type, keep)) == list(map(type, values))
      else:
        with pytest.raises(UserError, match=f"--schedule=.*: {name} must be a list of {wanted}.*, not "):
          config_from_flags()

  @pytest.mark.parametrize(
    "name, value", [("restore", True), ("keep_positions", True), ("method_parameters", {"a": 1})]
  )
  def test_flags_of_their_own_in_a_schedule_from_a_file(self, name, value, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"method": "himap", "prune_layers": [3, 9], "keep": [200, 50], name: value}))
    with (
      parsed(*NEEDED, f"--schedule={path}"),
      pytest.raises(UserError, match=f"{name} is a flag of its own, --{name}"),
    ):
      config_from_flags()

  @pytest.mark.parametrize("name, devices", [("cloud_tpu_v5e_8", 8), ("cloud_tpu_v5e_16", 16)])
  def test_flagfiles_of_slices(self, name, devices, monkeypatch):
    monkeypatch.chdir(ROOT)
    with parsed(f"--flagfile=experiments/flags/{name}.flags"):
      config, is_distributed = config_from_flags(), flags.FLAGS.distributed
    assert config.pruning == himap_jax.PruningConfig("himap", (2, 8), (288, 72))
    assert config.mesh["data"] * config.mesh["tensor"] == devices
    assert config.inputs.batch_size is None  # the memory of the slice says
    assert config.checkpoint.startswith("gs://") and is_distributed == (devices > 8)

  @pytest.mark.parametrize(
    "name, checkpoint, template, kept, is_pickled",
    [
      ("llava_7b", "liuhaotian/llava-v1.5-7b", "vicuna_v1", (288, 72), True),
      ("internvl_7b", "OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-7B", "vicuna_v1", (288, 72), True),
      ("qwen_vl_7b", "Qwen/Qwen-VL-Chat", "chat", (128, 32), True),
      ("qwen2_vl", "Qwen/Qwen2-VL-2B-Instruct", "chat", (128, 32), False),
      ("qwen2_5_vl", "Qwen/Qwen2.5-VL-3B-Instruct", "chat", (128, 32), False),
      ("qwen3_vl", "Qwen/Qwen3-VL-2B-Instruct", "chat", (128, 32), False),
      ("gemma3_4b", "google/gemma-3-4b-it", "chat", (128, 32), False),
      ("llava_next_7b", "llava-hf/llava-v1.6-mistral-7b-hf", "chat", (1170, 292), False),
      ("llava_onevision_7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf", "chat", (1464, 366), False),
      ("internvl3_1b", "OpenGVLab/InternVL3-1B-hf", "chat", (128, 32), False),
      ("smolvlm_256m", "HuggingFaceTB/SmolVLM-256M-Instruct", "chat", (32, 8), False),
    ],
  )
  def test_flagfiles_of_models(self, name, checkpoint, template, kept, is_pickled, monkeypatch):
    monkeypatch.chdir(ROOT)
    with parsed(f"--flagfile=experiments/flags/{name}.flags"):
      config = config_from_flags()
    assert (config.checkpoint, config.inputs.prompt_template) == (checkpoint, template)
    assert config.allow_pickle == is_pickled
    stages = config.pruning.schedule(32, kept[0] * 2).stages
    assert [(stage.layer, stage.keep) for stage in stages] == [(2, kept[0]), (8, kept[1])]

  def test_flagfile_of_llama_3_2_vision(self, monkeypatch):
    from experiments.shared import geometries
    from himap_jax.engine.accounting import method_inputs

    monkeypatch.chdir(ROOT)
    with parsed("--flagfile=experiments/flags/mllama_11b.flags"):
      config = config_from_flags()
    model = geometries.model_of("mllama_11b")
    stages = config.pruning.schedule(num_image_tokens=model.num_image_tokens(560, 560), **method_inputs(model)).stages
    assert [(stage.layer, stage.keep) for stage in stages] == [(4, 3202), (9, 800)]

  @pytest.mark.parametrize(
    "arguments, message",
    [
      (("--output=o",), "--prompts is required"),
      (("--prompts=p",), "--output is required"),
      ((*NEEDED, "--batch_size=0"), "--batch_size must be at least 1, but is 0"),
      ((*NEEDED, "--max_new_tokens=0"), "--max_new_tokens must be at least 1"),
      (
        (*NEEDED, "--emit=tokens,thoughts"),
        "--emit: unknown 'thoughts'; known: tokens, kept, patches, counts, logits, timing",
      ),
      ((*NEEDED, "--method=fasttv"), "unknown method 'fasttv'; known: cdpruner, dart, divprune, fastervlm,"),
      ((*NEEDED, "--method=divprune+fasttv"), "unknown method 'fasttv'"),
      ((*NEEDED, "--method_parameters=0.7"), "--method_parameters=0.7: not a list such as threshold:0.8"),
      ((*NEEDED, "--method_parameters=threshold:high"), "--method_parameters=threshold:high: not a list"),
      ((*NEEDED, "--keep=half,2"), "--keep=half,2: not a list of numbers"),
      ((*NEEDED, "--keep=1.5,2"), "--keep=1.5,2: not a list of numbers"),
      ((*NEEDED, "--prune_layers=2;8"), "not a list of numbers"),
      ((*NEEDED, "--prompt_buckets=a"), "--prompt_buckets=a: not a list of numbers"),
      ((*NEEDED, "--prompt_buckets="), "--prompt_buckets is empty; name lengths such as 64,128"),
      ((*NEEDED, "--emit=tokens,,"), "--emit: an empty name; known: tokens, kept,"),
      ((*NEEDED, "--schedule=/nowhere.json"), "--schedule=/nowhere.json: cannot be read (No such file or directory)"),
      (("--prompts=p", "--output=gs://b/o"), "--output=gs://b/o: only --checkpoint may be a URL; mount the bucket"),
      ((*NEEDED, "--image_dir=gs://b/i"), "--image_dir=gs://b/i: only --checkpoint may be a URL"),
      ((*NEEDED, "--columns=img:image"), "--columns: unknown field 'img' in 'img:image'; known: id, image, question"),
      ((*NEEDED, "--top_p=0.5"), "top_p below 1 needs a temperature above 0"),
      ((*NEEDED, "--temperature=nan"), "the temperature must be 0, or from 1e-06 to 1,000,000"),
    ],
  )
  def test_contradictions(self, arguments, message):
    with parsed(*arguments), pytest.raises(UserError) as caught:
      config_from_flags()
    assert message in str(caught.value)

  @pytest.mark.parametrize("argument", ["--dtype=int8", "--batch_size=two", "--no_such_flag"])
  def test_values_that_absl_refuses(self, argument):
    with pytest.raises(flags.Error), parsed(*NEEDED, argument):
      pass

  @pytest.mark.parametrize(
    "arguments, stray, message",
    [
      (("--prompts=/nowhere", "--output=o"), (), "himap_jax: cannot read the prompt file /nowhere"),
      ((), ("false",), "himap_jax: unexpected argument 'false'"),
    ],
  )
  def test_one_line_and_status_2(self, arguments, stray, message, capsys):
    with parsed(*arguments), pytest.raises(SystemExit) as caught:
      command.main(["run", *stray])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert output.err.startswith(message)
