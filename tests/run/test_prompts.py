import json
import pathlib

import pytest

from himap_jax.run import prompts
from himap_jax.run.prompts import Prompt
from himap_jax.run.records import open_records


def read_prompts(path):
  return list(prompts.read_prompts(open_records(pathlib.Path(path))))


def write(tmp_path, data):
  path = tmp_path / "prompts.jsonl"
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return path


def line(**fields):
  return json.dumps(fields) + "\n"


def test_own_layout_and_llava_layout(tmp_path):
  path = write(
    tmp_path,
    line(id="a", image="a.png", question="What?") + line(question_id=7, image="b.jpg", text="Where?", category="other"),
  )
  assert read_prompts(path) == [Prompt("a", ("a.png",), "What?"), Prompt(7, ("b.jpg",), "Where?")]


def test_several_images(tmp_path):
  path = write(
    tmp_path, line(id=1, image=["a.png", "b.png"], question="Which?") + line(id=2, image=["a"], question="?")
  )
  assert read_prompts(path) == [Prompt(1, ("a.png", "b.png"), "Which?"), Prompt(2, ("a",), "?")]


@pytest.mark.parametrize("fields", [{}, {"image": None}, {"image": []}])
def test_a_row_without_images(tmp_path, fields):
  assert read_prompts(write(tmp_path, line(id=1, question="Why?", **fields))) == [Prompt(1, (), "Why?")]


class TestMessages:
  def read(self, tmp_path, messages, **more):
    (prompt,) = read_prompts(write(tmp_path, line(id=1, messages=messages, **more)))
    return prompt

  def test_the_forms_of_openai_and_transformers(self, tmp_path):
    data = "data:image/png;base64,AAAA"
    prompt = self.read(
      tmp_path,
      [
        {"role": "system", "content": "Be brief."},
        {
          "role": "user",
          "content": [
            {"type": "text", "text": "Is "},
            {"type": "image", "image": "a.png"},
            {"type": "text", "text": " like "},
            {"type": "image_url", "image_url": {"url": data}},
          ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        {
          "role": "user",
          "content": [{"type": "image", "path": "c.png"}, {"type": "image_url", "image_url": "d"}],
        },
      ],
    )
    assert prompt.error is None and prompt.images == ("a.png", data, "c.png", "d")
    assert prompt.question == (
      ("system", "Be brief."),
      ("user", "Is <image> like <image>"),
      ("assistant", "No."),
      ("user", "<image><image>"),
    )
    assert json.loads(prompt.asked) == [list(message) for message in prompt.question]

  @pytest.mark.parametrize(
    ("messages", "error"),
    [
      ([], '"messages" must be a list of messages'),
      ("hello", '"messages" must be a list of messages'),
      (["hello"], "message 1 must be an object whose role is system, user, assistant"),
      ([{"role": "tool", "content": "x"}], "message 1 must be an object whose role is"),
      ([{"role": "user"}], "message 1: its content must be a text or a list of parts"),
      ([{"role": "user", "content": ["x"]}], "message 1: its content must be a text or a list of parts"),
      ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "type must be text, image or image_url, not 'video'"),
      ([{"role": "user", "content": [{"type": "image"}]}], 'message 1: "image" or "url" or "path" or "base64" or "image_url" is missing'),
      ([{"role": "user", "content": [{"type": "image", "image": 3}]}], 'message 1: "image" must be a string, not a number'),
      ([{"role": "user", "content": [{"type": "text", "text": 3}]}], 'message 1: "text" must be a string, not a number'),
      ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the last message must be the user's"),
      ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}],
       "only the first message may be the system's"),
    ],
  )  # fmt: skip
  def test_malformed(self, tmp_path, messages, error):
    assert error in self.read(tmp_path, messages).error

  def test_beside_a_question_or_an_image(self, tmp_path):
    for name in ("question", "image"):
      prompt = self.read(tmp_path, [{"role": "user", "content": "a"}], **{name: "x"})
      assert prompt.error == f'line 1: "{name}" and "messages" together'


def test_text_is_kept_as_it_is(tmp_path):
  question = " Que voit-on\u2028ici ?\n\x85 \U0001f600 "
  data = json.dumps({"id": "é", "image": "ü.png", "question": question})
  for encoded in (data, json.dumps(json.loads(data), ensure_ascii=False)):
    path = write(tmp_path, encoded)
    assert read_prompts(path) == [Prompt("é", ("ü.png",), question)]


def test_byte_order_mark_crlf_blank_lines_and_no_final_newline(tmp_path):
  row = b'{"id": %d,\r "image": "a.png", "question": "q"}'
  path = write(tmp_path, b"\xef\xbb\xbf" + row % 1 + b"\r\n\r\n  \t\n\n" + row % 2 + b"\r")
  assert [row.id for row in read_prompts(path)] == [1, 2]


@pytest.mark.parametrize(
  ("row", "expected"),
  [
    (b'{"id": "x", "image": ', "not valid JSON"),
    (b"{'id': 1}", "not valid JSON"),
    (b'{"id": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"id": "\xff\xfe", "image": "a", "question": "q"}', "not UTF-8"),
    (b'["id"]', "not a JSON object but a list"),
    (b"null", "not a JSON object but null"),
    (b"3.5", "not a JSON object but a number"),
    (b'{"image": "a", "question": "q"}', '"id" or "question_id" is missing'),
    (b'{"id": null, "image": "a", "question": "q"}', "is missing"),
    (b'{"id": "", "image": "a", "question": "q"}', '"id" is empty'),
    (b'{"id": true, "image": "a", "question": "q"}', "not a boolean"),
    (b'{"id": 1.5, "image": "a", "question": "q"}', "not a number"),
    (b'{"id": [1], "image": "a", "question": "q"}', "not a list"),
    (b'{"question_id": {}, "image": "a", "text": "q"}', '"question_id" must be'),
    (b'{"id": "\\ud800", "image": "a", "question": "q"}', "surrogate"),
  ],
)
def test_row_without_a_usable_id(tmp_path, row, expected):
  good = line(id="good", image="a.png", question="q").encode()
  path = write(tmp_path, good + b"\n" + row + b"\n" + good.replace(b"good", b"next"))
  before, error, after = read_prompts(path)
  assert (before.id, after.id) == ("good", "next")
  assert before.error is None and after.error is None
  assert error.id == "line:3"
  assert error.error.startswith("line 3: ")
  assert expected in error.error
  assert "\n" not in error.error


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"image": "", "question": "q"}, '"image" is empty'),
    ({"image": 3, "question": "q"}, '"image" must be a string or a list of strings, not a number'),
    ({"image": ["a", 3], "question": "q"}, '"image" must be a list of strings, not a number'),
    ({"image": ["a", [3]], "question": "q"}, '"image" must be a list of strings, not a list'),
    ({"image": ["a", " "], "question": "q"}, '"image" is empty'),
    ({"image": "a"}, '"question" or "text" is missing'),
    ({"image": "a", "question": " \n"}, '"question" is empty'),
    ({"image": "a", "text": {}}, '"text" must be a string, not an object'),
    ({"image": "a", "question": "\udc80"}, "surrogate"),
  ],
)
def test_row_with_an_id_keeps_it(tmp_path, fields, expected):
  path = write(tmp_path, line(id=5, **fields))
  (error,) = read_prompts(path)
  assert error.id == 5
  assert error.error.startswith("line 1: ")
  assert expected in error.error


def test_first_row_has_a_duplicate_id(tmp_path):
  row = line(id="a", image="a.png", question="q")
  rows = read_prompts(write(tmp_path, row + row + line(id="a") + row))
  assert rows[0] == Prompt("a", ("a.png",), "q")
  assert [row.id for row in rows[1:]] == ["line:2", "line:3", "line:4"]
  assert all('"a" was already used on line 1' in row.error for row in rows[1:])


def test_a_faulty_row_owns_its_id(tmp_path):
  rows = read_prompts(write(tmp_path, line(id="a") + line(id="a", image="a", question="q")))
  assert [row.id for row in rows] == ["a", "line:2"]
  assert all(row.error is not None for row in rows)


def test_a_number_and_its_text_are_one_id(tmp_path):
  fields = {"image": "a", "question": "q"}
  first, *others = read_prompts(write(tmp_path, "\n" + line(id=1, **fields) + line(id="1", **fields) + line(id=1)))
  assert first == Prompt(1, ("a",), "q") and first.key == "1"
  assert [row.id for row in others] == ["line:3", "line:4"]
  assert 'the id "1" was already used on line 2' in others[0].error
  assert "the id 1 was already used on line 2" in others[1].error


def test_file_names_are_as_different_as_ids():
  ids = ["a/b", "a_b", "..", "x" * 300, "x" * 299 + "y", "é", "plain-1.0", 7]
  names = [Prompt(row_id).file_name for row_id in ids]
  assert len(set(names)) == len(ids) and max(map(len, names)) < 120
  assert {"a_b", "plain-1.0", "7"} < set(names)
  assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-") for name in names)


def test_line_ids_never_collide_with_own_ids(tmp_path):
  fields = {"image": "a", "question": "q"}
  text = "{\n" + line(id="line:1", **fields) + line(id="line:1'", **fields) + "[\n"
  ids = [row.id for row in read_prompts(write(tmp_path, text))]
  assert ids[1:3] == ["line:1", "line:1'"]
  assert len(set(ids)) == 4


@pytest.mark.parametrize("data", [b"", b"\n\n  \r\n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path, data):
  with pytest.raises(ValueError, match="prompts.jsonl is empty"):
    read_prompts(write(tmp_path, data))


@pytest.mark.parametrize("name", ["absent.jsonl", "absent/prompts.jsonl", "a\0b"])
def test_unreadable_file(tmp_path, name):
  with pytest.raises(ValueError, match="cannot read the prompt file") as caught:
    read_prompts(f"{tmp_path}/{name}")
  assert "\n" not in str(caught.value)
