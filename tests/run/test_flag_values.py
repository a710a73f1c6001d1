"""The parsing of flag values."""

import types

import pytest

from himap_jax import UserError
from himap_jax.run import flag_values


@pytest.mark.parametrize("text, value", [("72", 72), ("12.5%", 0.125), ("100%", 1.0)])
def test_keep_counts(text, value):
  assert flag_values.keep_count(text) == value and type(flag_values.keep_count(text)) is type(value)


def listed(*values):
  return types.SimpleNamespace(name="parameters", value=list(values))


def test_named_numbers():
  given = flag_values.numbers(listed("threshold:0.8", " alpha: 2"), flag_values.named_number)
  assert given == (("threshold", 0.8), ("alpha", 2.0))
  for text in ("0.8", "threshold:", "a:b:1", "threshold=0.8"):
    with pytest.raises(UserError, match="--parameters=.*: not a list such as x:1"):
      flag_values.numbers(listed(text), flag_values.named_number, "such as x:1")


def test_mesh():
  assert flag_values.parse_mesh(["data:4", " tensor:2"]) == {"data": 4, "tensor": 2}
  for bad in (["data"], ["data:0"], ["data:x"], ["rows:2"], ["data:2", "data:2"], [":2"]):
    with pytest.raises(UserError, match="not an axis and its size"):
      flag_values.parse_mesh(bad)
