"""The runner of studies: flags → subject → check of the settings → measurement → files.

A study is a module with its own flags, `define_flags`, and a measurement, `run`; repeating a command resumes it. The
module ends with

    if __name__ == "__main__":
      study.start("flow.saliency", define_flags, run)
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from checkpoints_convert.json_files import write_json
from experiments import question_sets
from experiments.shared import tabular
from experiments.shared.subject import Subject
from himap_jax import checkpoint
from himap_jax.errors import UserError
from himap_jax.generation import InputConfig
from himap_jax.run import command, flag_values
from himap_jax.run.user_errors import user_error

if TYPE_CHECKING:
  from matplotlib.figure import Figure  # of the extra `study`, which only studies with plots need

SUBJECT_FLAGS = ("checkpoint", "dtype", "question_set", "num_questions", "seed")
SUBJECT_FLAGS += ("batch_size", "prompt_buckets", "prompt_template")


@dataclasses.dataclass(frozen=True)
class Report:
  """The results of a study: the lines of a Markdown file, and the contents of CSV, PNG and JSON files by name."""

  count: str  # sample size, such as `50 questions`
  summary: Sequence[str]
  tables: Mapping[str, Sequence[tabular.Row]]
  plots: "Mapping[str, Figure]" = dataclasses.field(default_factory=dict)
  documents: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

  def write(self, output: pathlib.Path, name: str, called: str) -> str:
    """Writes all files and returns the Markdown text, which names the command line `called`."""
    for table, rows in self.tables.items():
      tabular.write_csv(output / f"{table}.csv", rows)
    for plot, figure in self.plots.items():
      from experiments.shared import figures

      figures.save(output / f"{plot}.png", figure)
    for document, content in self.documents.items():
      write_json(output / f"{document}.json", content)
    text = "\n".join([f"`{called}`, {self.count}.", "", *self.summary]) + "\n"
    (output / f"{name}.md").write_text(text, encoding="utf-8")
    return text


def start(
  name: str,
  define_flags: Callable[[], None],
  run: Callable[[Any], Report | str | tuple[str, int]],
  *,
  has_subject: bool = True,
  **defaults: Any,
) -> None:
  """Runs `experiments.<name>` as a command, with its own `defaults` of the flags that studies share.

  `run` makes a report, which is written and printed, or writes its own files and returns the text to print, also with
  an exit status. Without a subject, only the flags of directories exist, with defaults.
  """
  if has_subject:
    define_shared_flags(**defaults)
  else:
    _define_directories(f"{name}_work", f"{name}_output")
  define_flags()
  for flag in flags.FLAGS.get_flags_for_module(__name__):  # for --help
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

  def action() -> int:
    directory("output")  # fails before the measurement
    result = run(flags.FLAGS)
    report, status = result if isinstance(result, tuple) else (result, 0)
    print(report if isinstance(report, str) else write(report, name))
    return status

  command.start_action(name.rpartition(".")[2], action, needed=("workdir", "output") if has_subject else ())


def write(report: Report, name: str) -> str:
  """Writes the report of `experiments.<name>` to `--output` and returns its text."""
  called = " ".join([f"python -m experiments.{name}", *sys.argv[1:]])
  return report.write(directory("output"), name.rpartition(".")[2], called)


def define_shared_flags(**defaults: Any) -> None:
  flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
  flags.DEFINE_bool("allow_pickle", False, "As in himap_jax.run.")
  flags.DEFINE_enum("dtype", "float32", sorted(checkpoint.DTYPES), "Dtype of parameters and activations.")
  fields = (
    "id, image (relative to the file), question, answer, type and optionally guess, from the question alone, and size"
  )
  flags.DEFINE_string("question_set", "scenes", f"{', '.join(question_sets.SETS)}, or a JSONL file of {fields}.")
  drawn = "Questions drawn from the set, each type in proportion; all if there is no number."
  flags.DEFINE_integer("num_questions", 50, drawn, lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Seed of the draw of questions and of all later random draws.")
  flags.DEFINE_integer("batch_size", 1, "Questions per batch.", lower_bound=1)
  flags.DEFINE_list("prompt_buckets", ["64", "128", "256"], "As in himap_jax.run.")
  flags.DEFINE_string("prompt_template", "chat", "As in himap_jax.run.")
  _define_directories()
  flags.DEFINE_string("compilation_cache_dir", None, "As in himap_jax.run.")
  for name, value in defaults.items():
    flags.FLAGS.set_default(name, value)


def _define_directories(workdir: str | None = None, output: str | None = None) -> None:
  flags.DEFINE_string("workdir", workdir, "Directory of measurements, to resume from.", required=not workdir)
  flags.DEFINE_string("output", output, "Directory for tables, plots and the report.", required=not output)


def inputs() -> InputConfig:
  """The preparation of prompts that the flags describe."""
  return InputConfig(
    flags.FLAGS.prompt_template, flag_values.buckets(flags.FLAGS["prompt_buckets"]), flags.FLAGS.batch_size
  )


def load_subject(*, needs_answers: bool = False, needs_sequence: bool = True, **batches: int) -> Subject:
  """The subject of the flags and of `Subject.load`'s arguments `batches`.

  Raises:
    UserError: an invalid flag; or the study needs image tokens in the decoder's sequence, and the model has none there.
  """
  values = flags.FLAGS
  command.use_compilation_cache(command.compilation_cache_dir(values.compilation_cache_dir))
  drawn = {"num_questions": values.num_questions, "seed": values.seed, "workdir": directory("workdir")}
  questions = question_sets.load(values.question_set, **drawn, needs_answers=needs_answers)
  settings = {"dtype": checkpoint.DTYPES[values.dtype], "inputs": inputs(), "seed": values.seed}
  opened = checkpoint.open_checkpoint(values.checkpoint, allow_pickle=values.allow_pickle)
  if needs_sequence and opened.config.text.cross_attention_layers:
    raise UserError(
      f"{values.checkpoint}: this study needs image tokens in the decoder's sequence, and this model's text reads them by "
      "cross-attention alone"
    )
  return Subject.load(opened, questions, **settings, **batches)


def open_workdir(**settings: Any) -> pathlib.Path:
  """The `--workdir` for measurements with these settings; `UserError` if it holds others."""
  workdir = directory("workdir").absolute()
  command.check_settings(workdir / "settings.json", settings, "use another --workdir")
  return workdir


def workdir_for(subject: Subject, *names: str, **more: Any) -> pathlib.Path:
  """The `--workdir` for measurements that depend on the subject, the named flags and more."""
  settings = {name: flags.FLAGS[name].value for name in (*SUBJECT_FLAGS, *names)}
  digests = {"fingerprint": subject.opened.digest(), "questions": question_sets.digest(subject.questions)}
  return open_workdir(**settings, **digests, **more)


def layers(flag: Any, subject: Subject) -> tuple[int, ...]:
  """The layers in a list flag, by default all in which image tokens are read.

  Raises:
    UserError: the model has no such layer, or reads no image tokens there.
  """
  cross = subject.opened.config.text.cross_attention_layers
  numbers = flag_values.numbers(flag, int) or cross or tuple(range(subject.num_layers))
  if not all(0 <= layer < subject.num_layers for layer in numbers):
    raise UserError(f"--{flag.name}: the model has layers 0 to {subject.num_layers - 1}")
  if cross and not set(numbers) <= set(cross):
    raise UserError(f"--{flag.name}: the model reads image tokens in layers {', '.join(map(str, cross))} alone")
  return numbers


def directory(name: str) -> pathlib.Path:
  """The directory that a flag names, created if missing."""
  path = pathlib.Path(flags.FLAGS[name].value)
  with user_error(f"--{name}: cannot create {path}"):
    path.mkdir(parents=True, exist_ok=True)
  return path
