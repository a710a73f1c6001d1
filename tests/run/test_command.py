"""What every command does with flags, settings, errors and exit statuses."""

import errno
import json
import signal
import time

import commands
import jax
import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver
from running import changed, read

from checkpoints_convert.errors import CheckpointError
from himap_jax import UserError
from himap_jax.engine.engine import Engine
from himap_jax.run import command, flag_help, job, model_flags, pruning_flags
from himap_jax.run import flags as run_flags
from himap_jax.run.user_errors import out_of_memory_is_user_error


def execute(action, *, argv=("run",), resumes=True):
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS(["run"], known_only=True)
    command.execute("tool", argv, action, resumes=resumes)
  return caught.value.code


@pytest.fixture
def interruptible():
  """Ctrl-C raises an exception, though the tests may have been started to ignore it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def raising(error):
  def action():
    raise error

  return action


def test_an_answer_that_the_terminal_cannot_show():
  code = "import sys\nsys.stdout.reconfigure(encoding='latin-1')\nfrom himap_jax.run import command\n"
  code += "command.start_action('tool', lambda: print('猫') or 0)\n"
  assert commands.Command(code).succeeded() == "\\u732b\n"


@pytest.mark.parametrize(
  "given, meant",
  [("model", "--checkpoint"), ("conv-mode", "--prompt_template"), ("batchsize", "--batch_size"), ("xyzzy", None)],
)
def test_a_flag_that_there_is_not(given, meant):
  known = ["checkpoint", "prompt_template", "batch_size", "top_p"]
  reason = flag_help.reason(flags.UnrecognizedFlagError(given), known)
  assert reason == f"unknown flag --{given}; {f'did you mean {meant}? ' if meant else ''}--help shows all"


@pytest.mark.parametrize(
  "given, message",
  [
    (("--target=t",), "--source is required; see --help"),
    (("--source=s", "--target="), "--target is empty; see --help"),
    (("--source=s", "--target=t", "--checkpoint="), "--checkpoint is empty; see --help"),
    (("--source=s", "--target=t", "--checkpoint=c"), None),
  ],
)
def test_a_flag_without_a_value(given, message):
  code = "from absl import flags\nfrom himap_jax.run import command\n"
  for name, required in (("source", True), ("target", True), ("checkpoint", False)):
    code += f"flags.DEFINE_string('{name}', None, '', required={required})\n"
  code += "command.start_action('tool', lambda: 0, needed=('source', 'target'))\n"
  done = commands.Command(code, *given)
  _, errors = done.communicate()
  assert (errors, done.process.exitcode) == ((f"tool: {message}\n", 2) if message else ("", 0))


def test_every_flag_of_the_command_has_a_topic_or_is_among_the_others():
  own = {flag.name for module in (model_flags, run_flags, pruning_flags) for flag in module_flags(module)}
  assert (
    {"prompts", "checkpoint", "method"} < own == {n for names in flag_help.TOPICS.values() for n in names} - {"show"}
  )


def module_flags(module):
  return flags.FLAGS.get_flags_for_module(module.__name__)


class TestExecute:
  @pytest.mark.parametrize("status", [0, 1])
  def test_the_action_s_status(self, status, capsys):
    assert execute(lambda: status) == status
    assert capsys.readouterr() == ("", "")

  @pytest.mark.parametrize("error", [UserError("no such directory"), CheckpointError("no such directory")])
  def test_what_the_user_can_mend_is_one_line(self, error, capsys):
    assert execute(raising(error)) == 2
    assert capsys.readouterr() == ("", "tool: no such directory\n")

  @pytest.mark.parametrize("resumes", [True, False])
  def test_interrupts(self, resumes, capsys):
    assert execute(raising(KeyboardInterrupt()), resumes=resumes) == 130
    end = "; the same command continues from here" if resumes else ""
    assert capsys.readouterr() == ("", f"\ntool: interrupted{end}\n")

  def test_an_interrupt_that_python_ignores_comes_again(self, capsys, interruptible):
    class Interrupted:
      def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)

    def action():
      Interrupted()
      time.sleep(10)
      return 0

    assert execute(action) == 130
    assert capsys.readouterr() == ("", "\ntool: interrupted; the same command continues from here\n")

  @pytest.mark.parametrize("error", [ValueError("3"), OSError(errno.ENOSPC, "full"), RuntimeError("x"), KeyError("y")])
  def test_all_else_is_a_bug_and_says_where(self, error, capsys):
    assert execute(raising(error)) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("Traceback (most recent call last)")
    assert "in action\n    raise error\n" in output.err and type(error).__name__ in output.err
    assert "tool: this is a bug; please report it" in output.err.splitlines()[-1]

  def test_stray_arguments(self, capsys):
    assert execute(lambda: 0, argv=("run", "false")) == 2
    assert capsys.readouterr().err == "tool: unexpected argument 'false': every setting is a --flag=value\n"


class TestSettings:
  def test_written_once_and_then_compared(self, tmp_path):
    path = tmp_path / "settings.json"
    command.check_settings(path, {"seed": 1, "layers": (2, 8)}, "use another --workdir")
    assert json.loads(path.read_text()) == {"seed": 1, "layers": [2, 8]}
    command.check_settings(path, {"layers": (2, 8), "seed": 1}, "use another --workdir")
    message = "settings.json: made with other settings .layers was .2, 8., now None; more was None, now 3.; use another"
    with pytest.raises(UserError, match=message):
      command.check_settings(path, {"seed": 1, "more": 3}, "use another --workdir")

  def test_a_directory_that_is_not_there(self, tmp_path):
    with pytest.raises(UserError, match="cannot write .*settings.json: No such file"):
      command.check_settings(tmp_path / "absent" / "settings.json", {}, "")


OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\nLargest: …"


class TestRuns:
  """What a run meets while it answers."""

  def test_a_device_without_memory(self, small, monkeypatch, capsys):
    def call(*_):
      yield []
      raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr(Engine, "answer", call)
    assert execute(lambda: job.run(small)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(
      "tool: the devices have too little memory for rows of 16 image tokens and 494 text tokens (RESOURCE_EXHAUSTED: "
    )
    assert all(flag in line for flag in ("--batch_size", "--int8_weights", "--mesh"))
    assert not small.output.exists()

  def test_a_real_allocation_that_is_too_large(self):
    with pytest.raises(
      UserError, match="too little memory for the weights .RESOURCE_EXHAUSTED: Out of memory allocating"
    ):
      with out_of_memory_is_user_error():
        jax.block_until_ready(jnp.zeros(1 << 50, jnp.int8))

  def test_other_errors_of_a_device_are_bugs(self):
    with pytest.raises(jax.errors.JaxRuntimeError), out_of_memory_is_user_error():
      raise jax.errors.JaxRuntimeError("INTERNAL: failed")

  def test_a_picture_that_cannot_be_written(self, small, tmp_path):
    (tmp_path / "pictures" / "a.png.partial").mkdir(parents=True)
    with pytest.raises(UserError, match="--pictures: cannot write .*a.png: Is a directory"):
      job.run(changed(small, pictures=tmp_path / "pictures"))

  def test_a_disk_that_is_full(self, small, monkeypatch):
    def full(descriptor):
      raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
      patch.setattr("himap_jax.run.writer.os.fsync", full)
      with pytest.raises(UserError, match="cannot write .*: No space left on device"):
        job.run(small)
    assert job.run(small) == 0 and len(read(small.output)) == 4
