"""Which cases of a sampled test run."""

import types

import cases


def item(nodeid, *marks):
  """A test with a mark `sampled` for each of the given arguments."""
  markers = [types.SimpleNamespace(args=(), kwargs=arguments) for arguments in marks]
  return types.SimpleNamespace(nodeid=nodeid, iter_markers={"sampled": markers}.get)


def test_a_quarter_of_every_test_and_in_time_all():
  tests = {"a.py::test_many": 7, "a.py::test_two": 2, "b.py::test_one": 1}
  items = [item(f"{name}[{case}]", {}) for name, count in tests.items() for case in range(count)]
  runs = [cases.draw([*items, item("a.py::test_plain[0]")], seed) for seed in range(40)]
  for drawn in runs:
    assert [sum(case.startswith(name) for case in drawn) for name in tests] == [2, 1, 1] and len(drawn) == 4
  assert set.union(*runs) == {own.nodeid for own in items}
  assert cases.draw(items, seed=3) == cases.draw(items, seed=3)


def test_a_quarter_of_a_group():
  names = [f"{file}.py::test_on_a_mesh" for file in "abcdef"]
  items = [*(item(name, {"of": "meshes"}) for name in names), item("g.py::test_a_command", {"of": "commands"})]
  runs = [cases.draw(items, seed) for seed in range(40)]
  assert all(len(drawn & set(names)) == 2 and "g.py::test_a_command" in drawn for drawn in runs)
  assert set.union(*runs) == {own.nodeid for own in items}


def test_a_quarter_of_the_files_of_a_group_and_of_the_cases_in_them():
  files = [f"{name}.py" for name in "abcdefgh"]
  whole = {"of": "studies", "by": "file"}
  plain = [item(f"{name}::test_{number}", whole) for name in files for number in range(3)]
  both = [item(f"{name}::test_cases[{case}]", {}, whole) for name in files for case in range(4)]
  runs = [cases.draw([*plain, *both], seed) for seed in range(200)]
  for drawn in runs:
    kept = {case.partition("::")[0] for case in drawn if "cases" not in case}
    assert len(kept) == 2 and drawn.issuperset(own.nodeid for own in plain if own.nodeid.partition("::")[0] in kept)
    assert sorted(case.partition("[")[0] for case in drawn if "cases" in case) == [
      f"{a}::test_cases" for a in sorted(kept)
    ]
  assert set.union(*runs) == {own.nodeid for own in [*plain, *both]}
