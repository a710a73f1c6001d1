"""The reader of prompts: what it holds of each bucket, and when a batch is full."""

import numpy as np

from himap_jax import UserError
from himap_jax.engine.batching import Bucket
from himap_jax.inputs import Example, Images
from himap_jax.run.prompts import Prompt
from himap_jax.run.reader import Prepared, Reader


class TestReader:
  """Prompts of one word; its length is the bucket."""

  @staticmethod
  def prepare(prompt):
    if prompt.question == "bad":
      raise UserError("bad")
    example = Example(*np.zeros((3, 1), np.int32), Images(np.zeros((1, 3, 2, 2), np.float32)))
    return Bucket(1, 16, len(prompt.question)), Prepared(prompt, example, None, "")

  def make(self, questions):
    prompts = [Prompt(index, ("image",), question) for index, question in enumerate(questions)]
    reader = Reader(prompts, self.prepare, [Bucket(1, 16, length) for length in (1, 2, 3)])
    reader.num_rows |= {Bucket(1, 16, 1): 2, Bucket(1, 16, 2): 2}
    return reader

  def test_reads_until_a_bucket_fills_a_batch(self):
    reader = self.make(["a", "bb", "bad", "d", "ee", "f", "g", "ccc"])
    for _ in range(2):
      reader.read()
      assert reader.filled() == [1, 0.5, 0]
    assert [row.prompt.id for row in reader.take(Bucket(1, 16, 1))] == [0, 3]
    assert [(prompt.id, error) for prompt, error in reader.take_errors()] == [(2, "bad")]
    assert reader.take_errors() == []
    reader.read()
    assert reader.filled() == [0, 1, 0]
    assert [row.prompt.id for row in reader.take(Bucket(1, 16, 2))] == [1, 4]
    reader.read()
    assert [row.prompt.id for row in reader.take(Bucket(1, 16, 1))] == [5, 6]

  def test_reads_until_a_bucket_of_which_no_rows_are_known_has_one(self):
    reader = self.make(["a", "ccc", "ccc", "ccc"])
    reader.read()
    assert reader.filled() == [0.5, 0, 1]
    reader.num_rows[Bucket(1, 16, 3)] = 4
    reader.read()
    assert reader.filled() == [0.5, 0, 0.75]

  def test_errors_are_few_and_without_pictures(self, monkeypatch):
    monkeypatch.setattr("himap_jax.run.reader.MAX_WAITING_ERRORS", 2)
    reader = self.make(["bad", "a", "bad", "bad", "c"])
    reader.read()
    assert reader.filled() == [0.5, 0, 0]
    assert [prompt.images for prompt, _ in reader.take_errors()] == [(), ()]
    reader.read()
    assert reader.filled() == [1, 0, 0]
    reader.refuse(Bucket(1, 16, 1), "large")
    assert [(prompt.id, prompt.images) for prompt, _ in reader.take_errors()] == [(3, ()), (1, ()), (4, ())]

  def test_rows_of_many_buckets_do_not_wait_for_ever(self, monkeypatch):
    """With more than a batch and 100 bytes the fullest bucket runs with the rows it has; 48 bytes a row."""
    monkeypatch.setattr("himap_jax.run.reader.MAX_WAITING_BATCHES", 1)
    monkeypatch.setattr("himap_jax.run.reader.MAX_WAITING_BYTES", 100)
    reader = self.make(["a", "bb", "ccc", "ccc", "a", "bb", "ccc"])
    reader.num_rows |= {Bucket(1, 16, length): 4 for length in (1, 2, 3)}
    reader.read()
    assert reader.filled() == [0.5, 0.25, 0.5]
    assert len(reader.take(Bucket(1, 16, 1))) == 2
    reader.read()
    assert reader.filled() == [0, 0.5, 0.75]
    monkeypatch.setattr("himap_jax.run.reader.MAX_WAITING_BYTES", 1000)
    reader = self.make(["a", "bb", "ccc", "ccc", "a", "bb", "ccc"])
    reader.num_rows |= {Bucket(1, 16, length): 4 for length in (1, 2, 3)}
    reader.read()
    assert reader.filled() == [0.5, 0.5, 0.75]

  def test_what_is_left_comes_in_smaller_batches(self):
    reader = self.make(["a", "bb", "c", "d"])
    for expected in ([1, 0.5, 0], [0.5, 0.5, 0]):
      reader.read()
      assert reader.filled() == expected
      reader.take(Bucket(1, 16, 1))
    assert [row.prompt.question for row in reader.take(Bucket(1, 16, 2))] == ["bb"]
    reader.read()
    assert reader.filled() == [0, 0, 0] and reader.take(Bucket(1, 16, 1)) == []
