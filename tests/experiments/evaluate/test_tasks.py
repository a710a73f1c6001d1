"""Tasks: questions word for word, scores of whole data sets, and submissions."""

import pathlib

import published
import pytest

from experiments.evaluate import loading
from experiments.evaluate.metrics import captions
from experiments.evaluate.tasks import TASKS

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
# As LLaVA-1.5's scripts and its docs/Evaluation.md write them.
QUESTIONS = {
  "vqav2": "Is the sky blue?" + SHORT,
  "textvqa": "What is the brand of this camera?" + SHORT,
  "textvqa_ocr": "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, Single-Use" + SHORT,
  "gqa": "Is it overcast?" + SHORT,
  "scienceqa_img": "Context: The magnets attract.\nWhich pair is stronger?\nA. weaker\nB. stronger" + LETTER,
  "aokvqa": "What is in the motorcyclist's mouth?\nA. toothpick\nB. food\nC. popsicle stick\nD. cigarette" + LETTER,
  "aokvqa_direct": "What is in the motorcyclist's mouth?" + SHORT,
  "mme": "Is it one?" + SHORT,
  "pope": "Is there a snowboard in the image?" + SHORT,
  "mmbench_en": "Look twice.\nWhat is right?\nA. up\nB. down\nC. left" + LETTER,
  "seed_image": "How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER,
  "mmmu": "Did <image 2> or <image 1> come first?\nA. <image 2>\nB. neither\nC. both\n" + LETTER,
  "nocaps": "Provide a one-sentence caption for the provided image.",
}


@pytest.fixture
def samples(tmp_path):
  return lambda name: list(loading.load(TASKS[name], str(published.write_hub(name, tmp_path))))


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions(name, samples):
  assert samples(name)[0].question == QUESTIONS[name]


def test_pictures_are_in_the_order_of_their_names(samples):
  choice, opened = samples("mmmu")
  assert choice.images == (published.picture(1), published.picture(2)) and opened.images == (published.picture(1),)
  assert opened.category == "Art_Theory" and opened.question.endswith(f"tons are in <image 1>?\n{SHORT}")


ANSWERS = {
  "vqav2": (["Yes", "2"], {"accuracy": 80, "accuracy: yes/no": 100, "accuracy: number": 60}),
  "textvqa": (["Dakota Digital."], {"accuracy": 100}),
  "gqa": (["No."], {"accuracy": 100}),
  "scienceqa_img": (["B", "The answer is A."], {"accuracy": 50, "accuracy: natural science": 50}),
  "aokvqa": (["D", "a cigarette"], {"accuracy": 100}),
  "aokvqa_direct": (["Food."], {"accuracy": 200 / 3}),
  "mme_count": (["Yes", "Yes"], {"points": 50, "points: perception": 50, "points: cognition": 0, "points: count": 50}),
  "chartqa": (
    ["14.5", "2009"],
    {"relaxed accuracy": 100, "relaxed accuracy: human": 100, "relaxed accuracy: augmented": 100},
  ),
  "docvqa": (["0.38"], {"ANLS": 75}),
  "mmbench_en": (["A", "C", "C"], {"accuracy": 50, "accuracy: attribute_reasoning": 50}),
  "seed_image": (["A."], {"accuracy": 100, "accuracy: 5": 100}),
  "mmmu": (["(B)", "It is 1200.50."], {"accuracy": 100, "accuracy: Art_Theory": 100}),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_scores(name, samples):
  answers, values = ANSWERS[name]
  task = TASKS[name]
  assert task.values(task.scored(samples(name), answers)) == pytest.approx(values)
  assert task.metric in values


def test_mme_adds_up_categories(samples):
  task = TASKS["mme"]
  values = task.values(task.scored(samples("mme"), ["yes", "no", "yes", "yes", "no", "yes"]))
  parts = {"code_reasoning": 200, "count": 50, "OCR": 0}
  assert values == {"points": 250, "points: perception": 50, "points: cognition": 200} | {
    f"points: {category}": value for category, value in parts.items()
  }
  asked, answers = samples("mme"), ["yes", "no", "yes", "yes", "no", "yes"]
  given = {sample.id: answer for sample, answer in zip(asked, answers, strict=True)}
  for part, value in (("mme_perception", 50), ("mme_cognition", 200), ("mme_count", 50)):
    own = samples(part)
    assert TASKS[part].values(TASKS[part].scored(own, [given[sample.id] for sample in own]))["points"] == value


def test_pope_averages_categories(samples):
  task = TASKS["pope"]
  scored = task.scored(samples("pope"), ["Yes, there is", "No", None])
  values = task.values(scored)
  assert values["F1: adversarial"] == 100 and values["F1: random"] == 0 and values["F1"] == pytest.approx(100 / 3)
  assert values["accuracy"] == pytest.approx(200 / 3) == 100 * sum(own.score for own in scored) / 3
  assert task.values(task.scored(samples("pope"), [None] * 3))["accuracy"] == 0


def test_captions_are_scored_together(samples):
  task, own = TASKS["nocaps"], samples("nocaps")
  name = "CIDEr" if captions.has_java() else "~CIDEr"
  scored = task.scored(own, ["A baby stands in front of a house.", None])
  assert scored[0].score > 0 and scored[1].score == 0
  both = task.scored(own, ["A baby stands in front of a house.", "A baby sleeps in front of a house."])
  assert task.values(both)[name] == pytest.approx(100 * sum(one.score for one in both) / 2)
  assert task.submission(scored) == [
    {"image_id": 0, "caption": "A baby stands in front of a house."},
    {"image_id": 1, "caption": ""},
  ]


def test_an_answer_that_is_missing_scores_nothing(samples):
  task = TASKS["vqav2"]
  scored = task.scored(samples("vqav2"), [None, "3"])
  assert [one.score for one in scored] == [0, 1] and task.values(scored)["accuracy"] == 50
  assert task.submission(scored)[0] == {"question_id": 262148000, "answer": ""}


def test_submissions_of_choices(samples):
  task, own = TASKS["aokvqa"], samples("aokvqa")
  assert task.submission(task.scored(own, ["B", None]))[own[0].id] == {"multiple_choice": "food"}
  task, own = TASKS["aokvqa_direct"], samples("aokvqa_direct")
  assert task.submission(task.scored(own, ["Cigarette."])) == {own[0].id: {"direct_answer": "cigarette"}}


def test_the_table_of_tasks():
  for name, task in TASKS.items():
    assert task.name == name and 0 < task.max_new_tokens <= 128
    assert all(known.source for known in task.known.values())
  assert len({task.title for task in TASKS.values()}) == len(TASKS)


def test_the_page_has_every_task_with_its_limit_and_known_score():
  page = pathlib.Path("docs/evaluation.md").read_text(encoding="utf-8")
  rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")]
  table = {row[0].strip("`"): row for row in rows if len(row) == 6}
  assert list(table) == list(TASKS)
  for name, (_, _, _, limit, _, known) in table.items():
    own = TASKS[name].known.get("LLaVA-1.5-7B")
    assert int(limit) == TASKS[name].max_new_tokens
    assert known == "unknown" if own is None else float(known.split()[0]) == own.value
