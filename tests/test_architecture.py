"""The layout of the code: which rooms may import which, read from the imports themselves."""

import ast
import pathlib
import tomllib

import pytest
import setuptools

ROOT = pathlib.Path(__file__).parent.parent

# A room → the only rooms of the project that it may import, beside itself.
ALLOWED = {
  "checkpoints_convert": set(),
  "himap_jax.errors": set(),
  "himap_jax.inputs": set(),
  "himap_jax.rgb": {"himap_jax.errors"},
  "himap_jax.model": {"himap_jax.inputs"},
  "himap_jax.pruning": {"himap_jax.inputs", "himap_jax.errors"},
  "himap_jax.families": {"himap_jax.inputs", "himap_jax.errors", "himap_jax.model", "checkpoints_convert"},
  "himap_jax.engine": {"himap_jax.inputs", "himap_jax.errors", "himap_jax.model", "himap_jax.pruning"},
}
NEVER = {"himap_jax": {"experiments", "tests"}, "checkpoints_convert": {"himap_jax", "experiments", "tests"}}


def modules():
  """The dotted name, file and imported names of every module of the three packages."""
  for package in ("himap_jax", "checkpoints_convert", "experiments"):
    for path in sorted((ROOT / package).rglob("*.py")):
      names = list(path.relative_to(ROOT).with_suffix("").parts)
      yield ".".join(names[:-1] if names[-1] == "__init__" else names), path, set(imports(path))


def imports(path):
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: a relative import"
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(name, room):
  return name == room or name.startswith(f"{room}.")


PACKAGES = ("himap_jax", "checkpoints_convert", "experiments")


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below_it(room):
  found = [(name, path, names) for name, path, names in modules() if is_in(name, room)]
  assert found
  for name, path, names in found:
    own = {other for other in names if any(is_in(other, package) for package in PACKAGES)} - {"himap_jax"}
    for other in own:
      assert any(is_in(other, allowed) or is_in(allowed, other) for allowed in (room, *ALLOWED[room])), (
        f"{path}: {name} imports {other}"
      )


@pytest.mark.parametrize("package", NEVER)
def test_packages_depend_one_way(package):
  for name, path, names in modules():
    if is_in(name, package):
      for other in names:
        assert not any(is_in(other, never) for never in NEVER[package]), f"{path}: {name} imports {other}"


@pytest.mark.parametrize("start", ["himap_jax.checkpoint", "himap_jax.generation"])
def test_the_library_has_no_flags(start):
  reached = reached_from(start, imports)
  assert not [name for name in reached if is_in(name, "himap_jax.run") or is_in(name, "absl.flags")]


def test_what_is_installed():
  find = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]["find"]
  assert find.pop("namespaces") is False
  packages = set(setuptools.find_packages(ROOT, **find))
  assert {name.partition(".")[0] for name in packages} == {"himap_jax", "checkpoints_convert"}
  files = [path.relative_to(ROOT) for name, path, _ in modules() if not is_in(name, "experiments")]
  assert packages == {".".join(path.parent.parts) for path in files}


def test_the_model_and_pruning_read_no_flags_and_no_files():
  for name, path, names in modules():
    if is_in(name, "himap_jax.model") or is_in(name, "himap_jax.pruning"):
      assert not {"absl", "absl.flags", "os", "pathlib", "io", "json"} & names, f"{path} reads flags or files"


def test_platforms_are_known_in_one_place():
  """What one platform alone needs stays in its own module; only the engine chooses among them."""
  for name, path, names in modules():
    if not is_in(name, "himap_jax.model.kernels") and name != "himap_jax.engine.sharding":
      chosen = {f"himap_jax.model.kernels.{platform}" for platform in ("cpu", "gpu", "tpu")} & names
      assert not chosen, f"{path}: {name} imports {chosen}"


def test_no_function_takes_more_than_seven_arguments():
  for _, path, _ in modules():
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        assert len(set(names) - {"self", "cls"}) <= 7, f"{path}:{node.lineno} {node.name}({', '.join(names)})"


def reached_from(start, imports_of):
  """All that a module imports, itself or by other modules of the project, with the packages they are in."""
  paths = {name: path for name, path, _ in modules()}
  reached, waiting = set(), [start]
  while waiting:
    name = waiting.pop()
    for parent in {name.rpartition(".")[0], name} - reached:
      reached.add(parent)
      waiting.extend(imports_of(paths[parent]) if parent in paths else ())
  return reached


OF_EXTRAS = {"datasets", "gguf", "lmms_eval", "matplotlib", "onnx", "optax", "pyarrow", "qwix", "torch"}


def at_import(path):
  """What a module imports while it is imported itself."""
  bodies = [ast.parse(path.read_text(encoding="utf-8")).body]
  while bodies:
    for node in bodies.pop():
      if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
      elif isinstance(node, ast.ImportFrom):
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
      elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
        bodies.append(node.body)


@pytest.mark.parametrize(
  "start",
  [
    "himap_jax.generation",  # most of what `himap_jax` imports when a name of it is used
    "himap_jax.run.__main__",
    "himap_jax.demo.__main__",
    "himap_jax.convert",
    "experiments.evaluate.__main__",
  ],
)
def test_packages_of_extras_are_imported_where_they_are_used(start):
  reached = reached_from(start, at_import)
  assert not [name for name in reached if name.partition(".")[0] in OF_EXTRAS]
  assert len([name for name in reached if is_in(name, "himap_jax")]) > 20
