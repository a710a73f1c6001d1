"""Processes of the command that are interrupted, killed and started again."""

import pathlib
import signal
import subprocess
import sys

import commands
import pytest
import running
from running import read, write_rows

ROOT = pathlib.Path(__file__).parents[2]
NAME = running.NAME
FLAGS = """
  checkpoint [no]allow_pickle prompts split columns image_dir output method prune_layers keep max_new_tokens
  temperature top_p seed [no]ignore_eos batch_size prompt_buckets prompt_template image_aspect_ratio dtype emit
  [no]resume compilation_cache_dir [no]strict pictures profile_dir method_parameters schedule [no]restore [no]keep_positions
  [no]int8_weights mesh [no]distributed coordinator num_processes process_id
""".split()


def start(*arguments, cache):
  return commands.Command("himap_jax.run", *arguments, HIMAP_JAX_CACHE=str(cache), COLUMNS="200")


def wait_for_lines(command, path, count):
  command.wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= count)


class TestProcesses:
  def test_help(self):
    text = commands.Command("himap_jax.run", "--help").succeeded()
    assert (
      text.index("Needed:\n  --prompts: ") < text.index("  --output: ") < text.index("Checkpoint:\n  --checkpoint: ")
    )
    assert "python -m himap_jax.run" in text
    for name in FLAGS:
      assert f"  --{name}: " in text

  @pytest.mark.parametrize("module", ["himap_jax.run", "experiments.compare", "experiments.flow.saliency"])
  def test_interrupted_while_it_imports(self, module, monkeypatch, tmp_path):
    """Without a word, while a library takes its time."""
    (tmp_path / "jax.py").write_text("import time\nprint(flush=True)\ntime.sleep(100)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = ["env", "--default-signal=INT", sys.executable, "-m", module]  # the tests may ignore it
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
      process.stdout.readline()
      process.send_signal(signal.SIGINT)
      assert process.communicate() == (b"", b"")
    assert process.returncode == -signal.SIGINT

  def test_an_import_of_experiments_leaves_interrupts_alone(self):
    code = "import signal\nbefore = signal.getsignal(signal.SIGINT)\nimport experiments\n"
    commands.Command(f"{code}assert signal.getsignal(signal.SIGINT) is before\n").succeeded()

  def test_interrupted_killed_and_started_again(self, config, checkpoints, cache, tmp_path):
    """One row a batch, from a flagfile, on a checkpoint that the first process converts."""
    rows = [{"id": i, "image": f"{i % 4}.png", "question": f"Is {i} one?"} for i in range(120)]
    write_rows(config.prompts, rows)
    values = {
            "checkpoint": checkpoints(NAME).directory, "prompts": config.prompts, "image_dir": tmp_path,
            "output": config.output, "prune_layers": "2,3", "keep": "50%,3", "max_new_tokens": 30, "batch_size": 1,
            "prompt_buckets": "40,60", "prompt_template": "vicuna\\n<image>{question}", "dtype": "float32",
            "emit": "tokens,kept", "ignore_eos": "true",
        }  # fmt: skip
    flagfile = tmp_path / "run.flags"
    flagfile.write_text("# a comment\n" + "".join(f"--{name}={value}\n" for name, value in values.items()))
    arguments = (f"--flagfile={flagfile}",)

    interrupted = start(*arguments, cache=cache)
    wait_for_lines(interrupted, config.output, 2)
    interrupted.interrupt()
    _, errors = interrupted.communicate()
    assert interrupted.process.exitcode == 130
    assert errors.strip().endswith("himap_jax: interrupted; the same command continues from here")
    assert "Traceback" not in errors
    done = config.output.read_text()
    assert done.endswith("\n")
    assert 1 <= done.count("\n") < 120  # the interrupt takes back a row that is not yet on the disk

    killed = start(*arguments, cache=cache)
    wait_for_lines(killed, config.output, done.count("\n") + 2)
    killed.process.kill()
    killed.communicate()
    done = config.output.read_text()
    assert done.count("\n") < 120
    config.output.write_text(done + '{"id": 119, "answer": "to')

    replacing = start(*arguments, "--noresume", "--keep=7,2", "--verbosity=0", cache=cache)
    replacing.wait_until(lambda: "ready: weights" in replacing.text()[1])
    replacing.process.kill()  # before its first batch
    replacing.communicate()
    assert config.output.read_text() == done + '{"id": 119, "answer": "to'

    last = start(*arguments, "--strict", cache=cache)
    table = last.succeeded()
    assert f"{120 - done.count(chr(10))} answered, 0 errors, {done.count(chr(10))} answered before" in table
    assert config.output.read_text().startswith(done)
    answers = read(config.output)
    assert sorted(answers) == list(range(120))
    for row in answers.values():
      assert len(row["token_ids"]) == 30
      assert [len(stage) for stage in row["kept"]] == [8, 3]
