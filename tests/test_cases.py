"""Which cases of a sampled test run."""

import types

import cases


def item(nodeid, marked=True):
  return types.SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: marked and name == "sampled")


def test_a_third_of_every_test_and_in_time_all():
  tests = {"a.py::test_many": 7, "a.py::test_two": 2, "b.py::test_one": 1}
  items = [item(f"{name}[{case}]") for name, count in tests.items() for case in range(count)]
  runs = [cases.draw([*items, item("a.py::test_plain[0]", marked=False)], seed) for seed in range(40)]
  for drawn in runs:
    assert [sum(case.startswith(name) for case in drawn) for name in tests] == [3, 1, 1] and len(drawn) == 5
  assert set.union(*runs) == {own.nodeid for own in items}
  assert cases.draw(items, seed=3) == cases.draw(items, seed=3)
