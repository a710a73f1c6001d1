"""Eight simulated devices, strict dtypes and shapes, and one tiny LLaVA of every kind for the whole session."""

import functools
import gc
import os
import secrets
import sys

import commands

FLAGS = ["--xla_force_host_platform_device_count=8"]
if "HIMAP_JAX_TEST_OPTIMIZED" not in os.environ:  # tiny programs take far longer to compile than to run
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
  FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
  FLAGS += ["--xla_cpu_experimental_ynn_fusion_type="]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # operations are named by scopes; tracing takes less time
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTHONPATH"] = commands.WITHOUT_TORCH  # for the commands that tests start
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # many processes import the same modules
sys.dont_write_bytecode = False
commands.allow_torch()  # to a worker of the tests themselves

from jaxtyping import install_import_hook

install_import_hook(["himap_jax", "checkpoints_convert"], "beartype.beartype")  # annotations hold, shapes included

import cases
import jax
import pytest
import tiny_checkpoints
import torch
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
torch.set_num_threads(1)  # tiny products lose far more time to torch's thread pool than they gain


# Files that compile many programs or start processes, the slowest first; `-m "not slow"` leaves them out.
SLOW = """
  test_notebook test_campaign test_demo test_speed test_optimized test_lmms_eval test_engine test_tiled
  test_flow_commands test_several_processes test_run test_qwen2_vl test_compile_study test_several_pictures
  test_dynamic test_bad_rows test_mllama test_pickled test_parity test_restore test_direct_loading test_int8_weights
  test_answers_on_meshes test_demo_assembly test_soak test_gemma3 test_methods_in_model test_compare_study
  test_cross_layers test_convert test_int8 test_against_lmms_eval test_capacity test_qwen_vl test_himap test_calibrate
  test_page test_golden test_comparing test_sharding test_saliency test_demo_training test_disruption test_processes
  test_llava_next test_recompilation test_dtypes test_adaptive_study test_encoding test_llava_onevision test_adaptive
  test_importance test_demo_command test_abstract test_evaluate_command test_busy
""".split()


def pytest_addoption(parser):
  parser.addoption("--all_cases", action="store_true", help="Run all tests marked `sampled` and all of their cases.")
  parser.addoption("--case_seed", type=int, help="Seed that draws their cases; printed at the end of a run.")


def pytest_configure(config):
  if config.option.case_seed is None:
    started_with = getattr(config, "workerinput", {})  # of xdist's workers, all of which draw the same cases
    config.option.case_seed = started_with.get("case_seed", secrets.randbelow(1 << 31))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
  node.workerinput["case_seed"] = node.config.option.case_seed


def pytest_terminal_summary(terminalreporter, config):
  if not config.option.all_cases:
    terminalreporter.write_line(f"sampled tests and cases were drawn by --case_seed={config.option.case_seed}")


def pytest_collection_finish():
  """Takes the many objects of imported modules out of garbage collection, which tracing triggers often."""
  gc.freeze()
  gc.set_threshold(200_000, 10, 100)


def pytest_collection_modifyitems(config, items):
  is_named = (
    config.option.keyword or getattr(config.option, "lf", False) or any("::" in argument for argument in config.args)
  )
  if not config.option.all_cases and not is_named:
    drawn, left_out, kept = cases.draw(items, config.option.case_seed), [], []
    for item in items:
      is_left_out = item.get_closest_marker("sampled") is not None and item.nodeid not in drawn
      (left_out if is_left_out else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
  for item in items:
    if item.path.stem in SLOW:
      item.add_marker(pytest.mark.slow)
  place = {name: index for index, name in enumerate(SLOW)}
  items.sort(key=lambda item: place.get(item.path.stem, len(SLOW)))  # so that no worker waits long for the last file


@pytest.fixture(autouse=True)
def no_compilation_cache():
  """Tests of commands set one in this process."""
  if jax.config.jax_compilation_cache_dir is not None:
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
  """Returns `load(name)`: a `tiny_checkpoints.Tiny` in both frameworks, made once."""
  return functools.cache(lambda name: tiny_checkpoints.make(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def loaded(checkpoints, tmp_path_factory):
  """Returns `load(name, batch_size)`: the same checkpoint through our loader, float32, on its devices."""
  import jax.numpy as jnp

  from himap_jax import checkpoint
  from himap_jax.engine import sharding

  cache_dir = tmp_path_factory.mktemp("cache")

  @functools.cache
  def load(name: str, batch_size: int = 1):
    mesh = sharding.make_mesh(data=max(size for size in range(1, 9) if batch_size % size == 0))
    directory = str(checkpoints(name).directory)
    return checkpoint.load(directory, dtype=jnp.float32, cache_dir=cache_dir, mesh=mesh)

  return load


@pytest.fixture(scope="session")
def images():
  """Four images of different shapes: coarse noise, so that patches differ from one another."""
  sizes = [(40, 40), (64, 37), (30, 51), (28, 28)]
  return [tiny_checkpoints.noise_image(size, seed) for seed, size in enumerate(sizes)]
