"""The benchmarks, by name."""

from experiments.evaluate.tasks.aokvqa import AOKVQA, AOKVQA_DIRECT
from experiments.evaluate.tasks.captioning import FLICKR30K, NOCAPS
from experiments.evaluate.tasks.chartqa import CHARTQA
from experiments.evaluate.tasks.docvqa import DOCVQA, DOCVQA_TEST
from experiments.evaluate.tasks.gqa import GQA
from experiments.evaluate.tasks.mmbench import MMBENCH
from experiments.evaluate.tasks.mme import MME, MME_COGNITION, MME_COUNT, MME_PERCEPTION
from experiments.evaluate.tasks.mmmu import MMMU
from experiments.evaluate.tasks.pope import POPE
from experiments.evaluate.tasks.scienceqa import SCIENCEQA
from experiments.evaluate.tasks.seed import SEED
from experiments.evaluate.tasks.task import Task
from experiments.evaluate.tasks.textvqa import TEXTVQA, TEXTVQA_OCR
from experiments.evaluate.tasks.vqav2 import VQAV2, VQAV2_TESTDEV
from himap_jax.errors import UserError

_ALL = (
  VQAV2, VQAV2_TESTDEV, TEXTVQA, TEXTVQA_OCR, GQA, SCIENCEQA, AOKVQA, AOKVQA_DIRECT, MME, MME_PERCEPTION, MME_COGNITION,
  MME_COUNT, POPE, CHARTQA, DOCVQA, DOCVQA_TEST, NOCAPS, FLICKR30K, MMBENCH, SEED, MMMU,
)  # fmt: skip
TASKS = {task.name: task for task in _ALL}


def find_task(name: str) -> Task:
  """A task by its name; raises `UserError` that lists those known."""
  if name not in TASKS:
    raise UserError(f"there is no task {name!r}; tasks: {', '.join(TASKS)}")
  return TASKS[name]
