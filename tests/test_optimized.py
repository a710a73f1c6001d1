"""The tests that compare numbers, once more with XLA's optimisations on, which the others leave off to compile faster."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
TESTS = ("tests/model/test_parity.py", "tests/engine/test_int8.py", "tests/engine/test_himap.py")
CHOSEN = "(greedy and siglip) or (rerunning and clip_gqa) or does_not_matter or rounded or beside or converted"


def test_parity_int8_and_decoding_with_optimizations():
  options = "-p no:cacheprovider -p no:xdist -o addopts=-q --all_cases".split()
  command = [sys.executable, "-m", "pytest", *options]
  result = subprocess.run(
    [*command, "-k", CHOSEN, *TESTS],
    cwd=ROOT,
    env=os.environ | {"HIMAP_JAX_TEST_OPTIMIZED": "1"},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
  assert " passed" in result.stdout and "skipped" not in result.stdout
