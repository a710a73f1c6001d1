"""Rows that say themselves how long their answers are, how they are sampled and where they stop."""

import json

import pytest
from running import QUESTIONS, changed, read, write_rows

from himap_jax.engine.sampling import Sampling
from himap_jax.run import job, prompts, records
from himap_jax.run.prompts import Options
from himap_jax.stops import cut_at_stop


def read_prompt(tmp_path, **fields):
  path = tmp_path / "one.jsonl"
  path.write_text(json.dumps({"id": 1, "question": "Why?", **fields}))
  (prompt,) = prompts.read_prompts(records.open_records(path))
  return prompt


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({}, Options()),
    ({"max_new_tokens": 3, "stop": "."}, Options(3, stop=(".",))),
    ({"temperature": 1, "top_p": 0.5, "stop": ["a", "b"]}, Options(None, 1.0, 0.5, ("a", "b"))),
    ({"max_new_tokens": None, "stop": None}, Options()),
  ],
)
def test_options(tmp_path, fields, expected):
  prompt = read_prompt(tmp_path, **fields)
  assert prompt.error is None and prompt.options == expected
  assert (prompt.asked == "Why?") == (expected == Options())


def test_options_of_a_table(tmp_path):
  """Numbers are text there, and an empty field is none."""
  path = tmp_path / "x.csv"
  path.write_text("id,question,image,max_new_tokens,temperature,stop\n1,Why?,,5,0.5,\n2,Who?,,,,x\n")
  own = list(prompts.read_prompts(records.open_records(path)))
  assert [prompt.options for prompt in own] == [Options(5, 0.5), Options(stop=("x",))]


@pytest.mark.parametrize(
  ("fields", "error"),
  [
    ({"max_new_tokens": 0}, '"max_new_tokens" must be at least 1, but is 0'),
    ({"max_new_tokens": 2.5}, '"max_new_tokens" must be an integer, not 2.5'),
    ({"max_new_tokens": True}, '"max_new_tokens" must be an integer, not True'),
    ({"max_new_tokens": "many"}, "\"max_new_tokens\" must be an integer, not 'many'"),
    ({"max_new_tokens": float("inf")}, '"max_new_tokens" must be an integer, not inf'),
    ({"max_new_tokens": 10**400}, '"max_new_tokens" must be an integer, not 10000'),
    ({"top_p": 10**400}, '"top_p" must be a number, not 10000'),
    ({"temperature": [1]}, r'"temperature" must be a number, not \[1\]'),
    ({"top_p": "NaN"}, "\"top_p\" must be a number, not 'NaN'"),
    ({"stop": ""}, '"stop" must be a text or a list of texts, none of them empty'),
    ({"stop": [3]}, '"stop" must be a text or a list of texts, none of them empty'),
  ],
)
def test_bad_options(tmp_path, fields, error):
  with pytest.raises(AssertionError, match=error):
    raise AssertionError(read_prompt(tmp_path, **fields).error)


class TestRun:
  @pytest.fixture
  def config(self, small):
    return changed(small, max_new_tokens=12, ignore_eos=True, emit=frozenset({"tokens"}))

  def answers(self, config, *options):
    """The rows of a run in which every question has its options."""
    rows = [
      {"id": str(row), "image": f"{index}.png", "question": question, **own}
      for index, ((row, question), own) in enumerate(zip(QUESTIONS.items(), options, strict=True))
    ]
    write_rows(config.prompts, rows)
    assert job.run(config) == 0
    return [read(config.output)[str(row)] for row in QUESTIONS]

  def test_every_row_has_its_own(self, config):
    plain = self.answers(changed(config, resume=False), {}, {}, {}, {})
    stop = plain[2]["answer"][4:6]
    short, sampled, stopped, other = self.answers(
      changed(config, resume=False),
      {"max_new_tokens": 5},
      {"temperature": 0.9, "top_p": 0.8},
      {"stop": [stop, "never"]},
      {},
    )
    assert short["token_ids"] == plain[0]["token_ids"][:5]
    assert sampled["token_ids"] != plain[1]["token_ids"] and len(sampled["token_ids"]) == 12
    assert stopped["answer"] == cut_at_stop(plain[2]["answer"], [stop]) and len(stopped["token_ids"]) < 12
    assert other == plain[3]
    of_flags = changed(config, resume=False, sampling=Sampling(0.9, 0.8))
    assert self.answers(of_flags, {}, {}, {}, {})[1]["token_ids"] == sampled["token_ids"]
    assert self.answers(of_flags, {"temperature": 0}, {}, {}, {})[0]["token_ids"] == plain[0]["token_ids"]

  def test_changed_options_are_answered_anew(self, config, capsys):
    before = self.answers(config, {"max_new_tokens": 2}, {}, {}, {})
    after = self.answers(config, {"max_new_tokens": 3}, {}, {}, {})
    assert "1 answered, 0 errors, 3 answered before" in capsys.readouterr().out
    assert before[1:] == after[1:] and before[0]["token_ids"] == after[0]["token_ids"][:2]

  def test_what_cannot_be_done_is_the_row_s_error(self, config):
    rows = self.answers(config, {"max_new_tokens": 13}, {"temperature": -1}, {"top_p": 0.5}, {"stop": "x"})
    assert [row["error"] for row in rows] == [
      "max_new_tokens is 13, but --max_new_tokens allows 12",
      "the temperature must be 0, or from 1e-06 to 1,000,000, but is -1.0",
      "top_p below 1 needs a temperature above 0: temperature 0 always takes the likeliest token",
      None,
    ]
