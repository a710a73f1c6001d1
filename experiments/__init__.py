import os
import sys

from himap_jax.run import startup

if sys.argv[:1] == ["-m"]:  # Python is looking for the command in this package
  startup.begin()
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported anywhere
