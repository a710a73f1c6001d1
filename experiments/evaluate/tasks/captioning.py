"""Captions: NoCaps (Agrawal et al. 2019) and Flickr30k (Young et al. 2014)."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from experiments.evaluate.metrics import captions
from experiments.evaluate.tasks.official import find, picture, read_json
from experiments.evaluate.tasks.task import Known, Official, Record, Sample, Scored, Task

PROMPT = "Provide a one-sentence caption for the provided image."


def _nocaps_sample(record: Record) -> Sample:
  wanted = tuple(record.get("annotations_captions") or ())
  number = int(record["image_id"])
  return Sample(str(number), (record["image"],), PROMPT, wanted, number=number)


def _flickr_sample(record: Record) -> Sample:
  return Sample(str(record["img_id"]), (record["image"],), PROMPT, tuple(record.get("caption") or ()))


def _scores(answers: Sequence[str], samples: Sequence[Sample]) -> captions.CaptionScores:
  return captions.score(tuple(answers), tuple(sample.references for sample in samples))


def _aggregate(scored: Sequence[Scored]) -> dict[str, float]:
  return _scores([one.answer or "" for one in scored], [one.sample for one in scored]).corpus


def _read_nocaps(directory: pathlib.Path, split: str) -> Iterator[Record]:
  content = read_json(find(directory, "nocaps_*.json", "val" if split == "validation" else split))
  wanted: dict[int, list[str]] = {}
  for own in content.get("annotations", ()):
    wanted.setdefault(own["image_id"], []).append(own["caption"])
  for image in content["images"]:
    yield {
      "image_id": image["id"],
      "image": picture(directory, image["file_name"], "images", "validation", "val"),
      "annotations_captions": wanted.get(image["id"], []),
    }


def _submission(scored: Sequence[Scored]) -> list[dict[str, int | str]]:
  return [{"image_id": one.sample.number, "caption": one.answer or ""} for one in scored]


NOCAPS = Task(
  name="nocaps",
  title="NoCaps val",
  repository="lmms-lab/NoCaps",
  config=None,
  split="validation",
  columns=("image_id", "image"),
  sample=_nocaps_sample,
  score=lambda answer, sample: _scores([answer], [sample]).each[0],
  score_all=lambda answers, samples: _scores(answers, samples).each,
  max_new_tokens=64,
  metric="CIDEr",
  aggregate=_aggregate,
  known={"LLaVA-1.5-7B": Known(105.5, "FastV's README, by lmms-eval")},
  official=Official(("nocaps_*.json",), _read_nocaps),
  submission=_submission,
)
FLICKR30K = dataclasses.replace(
  NOCAPS,
  name="flickr30k",
  title="Flickr30k, all images",
  repository="lmms-lab/flickr30k",
  split="test",
  columns=("img_id", "image"),
  sample=_flickr_sample,
  known={"LLaVA-1.5-7B": Known(74.9, "lmms-eval's results, from memory")},
  official=None,
  submission=None,
)
