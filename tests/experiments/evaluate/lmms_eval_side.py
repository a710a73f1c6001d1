"""A process of its own that runs lmms-eval's code on given records and answers.

It reads JSON: name → {"yaml", "docs", "answers" (for each document a list), "kwargs" that replace the task's own, "sets"
(names of scores of the first answers as a whole)}; and writes to `out.json`: name → {"prompts", "max_new_tokens",
"scores" (for each document and answer), "sets"}.
"""

import argparse
import copy
import inspect
import json
import pathlib
import sys

import lmms_eval.tasks
from lmms_eval.api import metrics
from lmms_eval.utils import load_yaml_config

ROOT = pathlib.Path(lmms_eval.tasks.__file__).parent


def main() -> None:
  out = {name: run(**own) for name, own in json.load(sys.stdin).items()}
  pathlib.Path("out.json").write_text(json.dumps(out))


def run(yaml, docs, answers, kwargs=None, sets=()):
  config = load_yaml_config(str(ROOT / f"{yaml}.yaml"))
  own = config.get("lmms_eval_specific_kwargs", {}).get("default")
  arguments = () if own is None else (own | (kwargs or {}),)
  results = [[process(config, doc, answer) for answer in given] for doc, given in zip(docs, answers, strict=True)]
  return {
    "prompts": [config["doc_to_text"](doc, *arguments) for doc in docs],
    "max_new_tokens": config["generation_kwargs"].get("max_new_tokens"),
    "scores": [] if sets else [[score(config, result) for result in given] for given in results],
    "sets": {name: aggregate(config, name, [given[0] for given in results]) for name in sets},
  }


def process(config, doc, answer):
  if "process_results" in config:
    return config["process_results"](copy.deepcopy(doc), [answer])
  (metric,) = config["metric_list"]
  if metric["metric"] == "anls":
    return metrics.anls(doc["answers"], [answer])
  options = {name: value for name, value in metric.items() if name.startswith("ignore")}
  return metrics.exact_match_fn(predictions=[answer], references=[doc["answer"]], **options)


def score(config, result):
  """The score of one answer, from 0 to 1."""
  name, value = next(iter(result.items()))
  if isinstance(value, dict):
    value = value["score"] if "score" in value else aggregate(config, name, [result])
  return float(value) / (100 if name == "gpt_eval_score" else 1)


def aggregate(config, name, results):
  function = next(own["aggregation"] for own in config["metric_list"] if own["metric"] == name)
  values = [result[name] for result in results if name in result]
  takes_arguments = "args" in inspect.signature(function).parameters
  return float(function(values, argparse.Namespace(output_path=".")) if takes_arguments else function(values))


if __name__ == "__main__":
  main()
