"""Small data sets in the layouts in which they are published: parquet files of the hub, and the authors' own files.

Column names and types are those of the data sets' cards.
"""

import base64
import csv
import functools
import io
import json
import pathlib

import datasets
from datasets import Features, List, Value
from PIL import Image

TEXT, NUMBER, TEXTS = Value("string"), Value("int64"), List(Value("string"))
PICTURE = datasets.Image()


@functools.cache
def picture(seed: int, kind: str = "PNG") -> bytes:
  """A file of a small picture in one colour."""
  file = io.BytesIO()
  Image.new("RGB", (8 + seed, 6), (seed * 40 % 256, 90, 200)).save(file, kind)
  return file.getvalue()


def held(seed: int) -> dict:
  """A picture as the hub's Image feature stores it."""
  return {"bytes": picture(seed), "path": f"{seed}.png"}


def texts(names: str) -> dict:
  return dict.fromkeys(names.split(), TEXT)


VQAV2 = {
  "features": texts("question_type multiple_choice_answer answer_type question")
  | {"answers": List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER})}
  | {"image_id": NUMBER, "question_id": NUMBER, "image": PICTURE},
  "rows": [
    {
      "question_type": "is the",
      "multiple_choice_answer": "yes",
      "answer_type": "yes/no",
      "question": "Is the sky blue?",
      "answers": [
        {"answer": answer, "answer_confidence": "yes", "answer_id": n}
        for n, answer in enumerate(["yes"] * 7 + ["no"] * 3, 1)
      ],
      "image_id": 262148,
      "question_id": 262148000,
      "image": held(1),
    },
    {
      "question_type": "how many",
      "multiple_choice_answer": "2",
      "answer_type": "number",
      "question": "How many dogs are there?",
      "answers": [
        {"answer": answer, "answer_confidence": "maybe", "answer_id": n}
        for n, answer in enumerate(["2"] * 2 + ["3"] * 8, 1)
      ],
      "image_id": 262161,
      "question_id": 262161001,
      "image": held(2),
    },
  ],
}
TESTDEV = {
  "features": VQAV2["features"],
  "rows": [
    {name: None for name in VQAV2["features"]}
    | {"question": "What is it?", "question_id": 1000, "image_id": 1, "image": held(3)}
  ],
}
TEXTVQA = {
  "features": texts("image_id question flickr_original_url flickr_300k_url set_name")
  | {"question_id": Value("int32"), "image_width": Value("int32"), "image_height": Value("int32"), "image": PICTURE}
  | dict.fromkeys(("question_tokens", "answers", "image_classes", "ocr_tokens"), TEXTS),
  "rows": [
    {
      "image_id": "003a8ae2ef43b901",
      "question": "what is the brand of this Camera?",
      "flickr_original_url": "https://…/o.jpg",
      "flickr_300k_url": "https://…/z.jpg",
      "set_name": "val",
      "question_id": 34602,
      "image_width": 1024,
      "image_height": 664,
      "image": held(1),
      "question_tokens": ["what", "is", "the", "brand", "of", "this", "camera"],
      "answers": ["nous les gosses", "dakota", "clos culombu", *["dakota digital"] * 5, "dakota", "dakota"],
      "image_classes": ["Cassette deck", "Printer"],
      "ocr_tokens": ["DAKOTA", "DIGITAL", "Single-Use"],
    }
  ],
}
GQA = {
  "features": texts("id imageId question answer fullAnswer semanticStr")
  | {"isBalanced": Value("bool"), "groups": {"global": TEXT, "local": TEXT}}
  | {"types": {"structural": TEXT, "semantic": TEXT, "detailed": TEXT}},
  "rows": [
    {
      "id": "201307251",
      "imageId": "n161313",
      "question": "Is it overcast?",
      "answer": "no",
      "fullAnswer": "No, it is clear.",
      "semanticStr": "select: scene->verify weather: overcast [0]",
      "isBalanced": True,
      "groups": {"global": None, "local": "13-weather_overcast"},
      "types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"},
    }
  ],
}
GQA_IMAGES = {"features": {"id": TEXT, "image": PICTURE}, "rows": [{"id": "n161313", "image": held(4)}]}
SCIENCEQA = {
  "features": texts("question hint task grade subject topic category skill lecture solution")
  | {"image": PICTURE, "choices": TEXTS, "answer": Value("int8")},
  "rows": [
    {
      "question": question,
      "hint": hint,
      "task": "closed choice",
      "grade": "grade4",
      "subject": "natural science",
      "topic": "physics",
      "category": "Magnets",
      "skill": "Compare magnitudes",
      "lecture": "…",
      "solution": "…",
      "image": held(2),
      "choices": ["weaker", "stronger", "the same"][:count],
      "answer": count - 1,
    }
    for question, hint, count in (("Which pair is stronger?", "The magnets attract.", 2), ("And now?", "", 3))
  ],
}
AOKVQA = {
  "features": texts("question_id question direct_answers")
  | {"image": PICTURE, "choices": TEXTS, "rationales": TEXTS}
  | {"correct_choice_idx": Value("int8"), "difficult_direct_answer": Value("bool")},
  "rows": [
    {
      "question_id": f"22jbM6gDxdaMaunuzgrsB{n}",
      "question": "What is in the motorcyclist's mouth?",
      "direct_answers": "['cigarette', 'cigarette', 'food', 'cigarette', 'food', 'mask', 'cigarette', 'straw', 'mouth', 'smoke']",
      "image": held(5),
      "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
      "rationales": ["He's smoking."],
      "correct_choice_idx": 3,
      "difficult_direct_answer": bool(n),
    }
    for n in range(2)
  ],
}
MME = {
  "features": texts("question_id question answer category") | {"image": PICTURE},
  "rows": [
    {
      "question_id": f"{category}/0020.png",
      "question": f"Is it {what}? Please answer yes or no.",
      "answer": answer,
      "category": category,
      "image": held(1),
    }
    for category in ("code_reasoning", "count", "OCR")
    for what, answer in (("one", "Yes"), ("two", "No"))
  ],
}
POPE = {
  "features": texts("id question_id question answer image_source category") | {"image": PICTURE},
  "rows": [
    {
      "id": str(n),
      "question_id": "1",
      "question": "Is there a snowboard in the image?",
      "answer": answer,
      "image_source": "COCO_val2014_000000310196",
      "category": category,
      "image": held(n),
    }
    for n, (category, answer) in enumerate((("adversarial", "yes"), ("popular", "no"), ("random", "yes")))
  ],
}
CHARTQA = {
  "features": texts("type question answer") | {"image": PICTURE},
  "rows": [
    {"type": "human_test", "question": "How many items?", "answer": "14", "image": held(1)},
    {"type": "augmented_test", "question": "Which year?", "answer": "2010", "image": held(2)},
  ],
}
DOCVQA = {
  "features": texts("questionId question ucsf_document_id ucsf_document_page_no data_split")
  | {"question_types": TEXTS, "image": PICTURE, "docId": NUMBER, "answers": TEXTS},
  "rows": [
    {
      "questionId": "49153",
      "question": "What is the ‘actual’ value per 1000, during the year 1975?",
      "ucsf_document_id": "pybv0228",
      "ucsf_document_page_no": "81",
      "data_split": "val",
      "question_types": ["figure/diagram"],
      "image": held(3),
      "docId": 14465,
      "answers": ["0.28"],
    }
  ],
}
DOCVQA_TEST = {
  "features": DOCVQA["features"],
  "rows": [DOCVQA["rows"][0] | {"answers": None, "question_types": None, "data_split": "test"}],
}
NOCAPS = {
  "features": texts("image_coco_url image_date_captured image_file_name image_open_images_id")
  | dict.fromkeys(("image_height", "image_width", "image_id"), Value("int32"))
  | {
    "image": PICTURE,
    "image_license": Value("int8"),
    "annotations_ids": List(Value("int32")),
    "annotations_captions": TEXTS,
  },
  "rows": [
    {
      "image_coco_url": "https://…/0013ea2087020901.jpg",
      "image_date_captured": "2018-11-06 11:04:33",
      "image_file_name": "0013ea2087020901.jpg",
      "image_open_images_id": "0013ea2087020901",
      "image_height": 1024,
      "image_width": 732,
      "image_id": n,
      "image": held(n),
      "image_license": 0,
      "annotations_ids": [2 * n, 2 * n + 1],
      "annotations_captions": [f"A baby {what} in front of a house.", f"The baby {what} outside."],
    }
    for n, what in enumerate(("stands", "sleeps"))
  ],
}
FLICKR30K = {
  "features": texts("img_id filename") | {"image": PICTURE, "caption": TEXTS, "sentids": TEXTS},
  "rows": [
    {
      "img_id": "0",
      "filename": "1000092795.jpg",
      "image": held(1),
      "caption": ["Two young guys look at their hands.", "Two men stand in a yard."],
      "sentids": ["0", "1"],
    }
  ],
}
MMBENCH = {
  "features": texts("question hint answer A B C D category source L2-category comment split")
  | {"index": NUMBER, "image": PICTURE},
  "rows": [
    {
      "index": index,
      "question": "What is right?",
      "hint": hint,
      "answer": answer,
      "A": options[0],
      "B": options[1],
      "C": options[2],
      "D": "nan",
      "category": "identity_reasoning",
      "source": "scienceqa",
      "L2-category": "attribute_reasoning",
      "comment": "nan",
      "split": "dev",
      "image": held(2),
    }
    for index, hint, answer, options in (
      (241, "Look twice.", "A", ("up", "down", "left")),
      (1000241, "Look twice.", "B", ("left", "up", "down")),
      (252, "nan", "C", ("red", "blue", "green")),
    )
  ],
}
SEED = {
  "features": texts("answer choice_a choice_b choice_c choice_d data_id data_type question question_id")
  | {"question_type_id": Value("int16"), "image": List(PICTURE), "segment": List(NUMBER)},
  "rows": [
    {
      "answer": "A",
      "choice_a": "One",
      "choice_b": "Two",
      "choice_c": "Three",
      "choice_d": "Four",
      "data_id": "1454426_2591111986",
      "data_type": kind,
      "question": "How many towels are in the image?",
      "question_id": str(n),
      "question_type_id": 5,
      "image": [held(n)] * (8 if kind == "video" else 1),
      "segment": [],
    }
    for n, kind in enumerate(("image", "video"))
  ],
}
MMMU = {
  "features": texts("id question options explanation img_type answer topic_difficulty question_type subfield")
  | {f"image_{n}": PICTURE for n in range(1, 8)},
  "rows": [
    dict.fromkeys(f"image_{n}" for n in range(1, 8))
    | {
      "id": f"validation_Art_Theory_{n}",
      "question": question,
      "options": options,
      "explanation": "",
      "img_type": "['Paintings']",
      "answer": answer,
      "topic_difficulty": "Medium",
      "question_type": "open" if options == "[]" else "multiple-choice",
      "subfield": "Art Theory",
      "image_1": held(1),
      "image_2": held(2) if "2>" in question + options else None,
    }
    for n, (question, options, answer) in enumerate(
      (
        ("Did <image 2> or <image 1> come first?", "['<image 2>', 'neither', 'both']", "B"),
        ("How many tons are in <image 1>?", "[]", "1,200.5"),
      )
    )
  ],
}

# Task → its repository's name, and what lies in the repository.
HUB = {
  "vqav2": ("lmms-lab/VQAv2", {"data/validation": VQAV2}),
  "vqav2_testdev": ("lmms-lab/VQAv2", {"data/testdev": TESTDEV}),
  "textvqa": ("lmms-lab/textvqa", {"data/validation": TEXTVQA}),
  "textvqa_ocr": ("lmms-lab/textvqa", {"data/validation": TEXTVQA}),
  "gqa": (
    "lmms-lab/GQA",
    {"testdev_balanced_instructions/testdev": GQA, "testdev_balanced_images/testdev": GQA_IMAGES},
  ),
  "scienceqa_img": ("lmms-lab/ScienceQA", {"ScienceQA-IMG/test": SCIENCEQA}),
  "aokvqa": ("HuggingFaceM4/A-OKVQA", {"data/validation": AOKVQA}),
  "aokvqa_direct": ("HuggingFaceM4/A-OKVQA", {"data/validation": AOKVQA}),
  "mme": ("lmms-lab/MME", {"data/test": MME}),
  "mme_perception": ("lmms-lab/MME", {"data/test": MME}),
  "mme_cognition": ("lmms-lab/MME", {"data/test": MME}),
  "mme_count": ("lmms-lab/MME", {"data/test": MME}),
  "pope": ("lmms-lab/POPE", {"data/test": POPE}),
  "chartqa": ("lmms-lab/ChartQA", {"data/test": CHARTQA}),
  "docvqa": ("lmms-lab/DocVQA", {"DocVQA/validation": DOCVQA}),
  "docvqa_test": ("lmms-lab/DocVQA", {"DocVQA/test": DOCVQA_TEST}),
  "nocaps": ("lmms-lab/NoCaps", {"data/validation": NOCAPS}),
  "flickr30k": ("lmms-lab/flickr30k", {"data/test": FLICKR30K}),
  "mmbench_en": ("lmms-lab/MMBench", {"en/dev": MMBENCH}),
  "seed_image": ("lmms-lab/SEED-Bench", {"data/test": SEED}),
  "mmmu": ("lmms-lab/MMMU", {"data/validation": MMMU}),
}


def write_parquet(path: pathlib.Path, table: dict) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  columns = {name: [row[name] for row in table["rows"]] for name in table["features"]}
  datasets.Dataset.from_dict(columns, Features(table["features"])).to_parquet(path)


def write_hub(name: str, root: pathlib.Path) -> pathlib.Path:
  """Writes a task's repository; returns its directory."""
  repository, tables = HUB[name]
  for place, table in tables.items():
    write_parquet(root / repository / f"{place}-00000-of-00001.parquet", table)
  return root / repository


def write_picture(path: pathlib.Path, seed: int) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(picture(seed, "JPEG" if path.suffix == ".jpg" else "PNG"))


def _json(path: pathlib.Path, content) -> None:
  path.write_text(json.dumps(content), encoding="utf-8")


def official_vqav2(root: pathlib.Path) -> None:
  questions, annotations = [], []
  for row in VQAV2["rows"]:
    questions.append({name: row[name] for name in ("image_id", "question", "question_id")})
    annotations.append({name: row[name] for name in row if name not in ("question", "image")})
    write_picture(root / f"val2014/COCO_val2014_{row['image_id']:012d}.jpg", 1)
  about = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014", "task_type": "Open-Ended"}
  _json(root / "v2_OpenEnded_mscoco_val2014_questions.json", about | {"questions": questions})
  _json(root / "v2_mscoco_val2014_annotations.json", about | {"annotations": annotations})
  asked = [{"image_id": 1, "question": "What is it?", "question_id": 1000}]
  _json(root / "v2_OpenEnded_mscoco_test-dev2015_questions.json", about | {"questions": asked})
  write_picture(root / "test2015/COCO_test2015_000000000001.jpg", 1)


def official_textvqa(root: pathlib.Path) -> None:
  (row,) = TEXTVQA["rows"]
  own = {name: value for name, value in row.items() if name not in ("image", "ocr_tokens")}
  _json(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "data": [own]})
  words = {"image_id": row["image_id"], "ocr_tokens": row["ocr_tokens"], "ocr_info": []}
  _json(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [words]})
  write_picture(root / f"train_images/{row['image_id']}.jpg", 1)


def official_scienceqa(root: pathlib.Path) -> None:
  problems = {str(n): row | {"image": "image.png", "split": "test"} for n, row in enumerate(SCIENCEQA["rows"], start=4)}
  problems["9"] = problems["4"] | {"image": None}
  _json(root / "problems.json", problems)
  _json(root / "pid_splits.json", {"train": [], "test": ["5", "9", "4"]})
  for number in "45":
    write_picture(root / f"images/test/{number}/image.png", 1)


def official_pope(root: pathlib.Path) -> None:
  for row in POPE["rows"]:
    own = {"question_id": 1, "image": f"{row['image_source']}.jpg", "text": row["question"], "label": row["answer"]}
    (root / f"coco_pope_{row['category']}.json").write_text(json.dumps(own) + "\n")
  write_picture(root / "val2014/COCO_val2014_000000310196.jpg", 1)


def official_nocaps(root: pathlib.Path) -> None:
  images = [
    {"id": row["image_id"], "file_name": f"{row['image_id']}.jpg", "open_images_id": "00", "width": 8, "height": 6}
    for row in NOCAPS["rows"]
  ]
  annotations = [
    {"image_id": row["image_id"], "id": n, "caption": caption}
    for row in NOCAPS["rows"]
    for n, caption in enumerate(row["annotations_captions"])
  ]
  about = {"info": {}, "licenses": []}
  _json(root / "nocaps_val_4500_captions.json", about | {"images": images, "annotations": annotations})
  for image in images:
    write_picture(root / f"images/{image['file_name']}", 1)


def official_mmbench(root: pathlib.Path) -> None:
  with open(root / "mmbench_dev_20230712.tsv", "w", encoding="utf-8", newline="") as file:
    names = ["index", *(name for name in MMBENCH["features"] if name not in ("index", "L2-category")), "l2-category"]
    writer = csv.DictWriter(file, names, delimiter="\t", extrasaction="ignore")
    writer.writeheader()
    for row in MMBENCH["rows"]:
      own = {name: "" if value == "nan" else value for name, value in row.items()}
      # A copy with another order of options may name the row that holds its picture.
      image = "241" if row["index"] > 1_000_000 else base64.b64encode(row["image"]["bytes"]).decode()
      writer.writerow(own | {"image": image, "l2-category": row["L2-category"]})


OFFICIAL = {
  "vqav2": official_vqav2,
  "vqav2_testdev": official_vqav2,
  "textvqa": official_textvqa,
  "textvqa_ocr": official_textvqa,
  "scienceqa_img": official_scienceqa,
  "pope": official_pope,
  "nocaps": official_nocaps,
  "mmbench_en": official_mmbench,
}
