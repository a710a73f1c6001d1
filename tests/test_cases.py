"""Which cases of a sampled test run."""

import types

import cases


def item(nodeid, marked=True, **arguments):
  marker = types.SimpleNamespace(args=(), kwargs=arguments) if marked else None
  return types.SimpleNamespace(nodeid=nodeid, get_closest_marker={"sampled": marker}.get)


def test_a_quarter_of_every_test_and_in_time_all():
  tests = {"a.py::test_many": 7, "a.py::test_two": 2, "b.py::test_one": 1}
  items = [item(f"{name}[{case}]") for name, count in tests.items() for case in range(count)]
  runs = [cases.draw([*items, item("a.py::test_plain[0]", marked=False)], seed) for seed in range(40)]
  for drawn in runs:
    assert [sum(case.startswith(name) for case in drawn) for name in tests] == [2, 1, 1] and len(drawn) == 4
  assert set.union(*runs) == {own.nodeid for own in items}
  assert cases.draw(items, seed=3) == cases.draw(items, seed=3)


def test_a_quarter_of_a_group():
  names = [f"{file}.py::test_on_a_mesh" for file in "abcdef"]
  items = [*(item(name, of="meshes") for name in names), item("g.py::test_a_command", of="commands")]
  runs = [cases.draw(items, seed) for seed in range(40)]
  assert all(len(drawn & set(names)) == 2 and "g.py::test_a_command" in drawn for drawn in runs)
  assert set.union(*runs) == {own.nodeid for own in items}
