"""The memory that a process of its own takes beside what it had: its start, and a checkpoint large enough to see it."""

import json
import shutil

from layouts import WEIGHTS

from himap_jax import checkpoint

# Defines `private()`, the bytes of the process alone, and a list `peak` of their highest value since `start()`.
WATCHED = """
import threading, time
private = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) << 10
peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], private())
        time.sleep(0.002)
def start():
    peak[0] = private()
    return peak[0]
threading.Thread(target=watch, daemon=True).start()
"""


def widen(directory, target, num_layers):
  """A copy without weights whose decoder layers have 4 x 4 MB and 3 x 25 MB in bfloat16; shapes by name on the Hub."""
  shutil.copytree(directory, target)
  (target / WEIGHTS).unlink()
  config = json.loads((target / "config.json").read_text())
  config["text_config"] |= dict(hidden_size=1024, intermediate_size=12_288, num_hidden_layers=num_layers, head_dim=256)
  (target / "config.json").write_text(json.dumps(config))
  shapes = checkpoint.describe(config, "config.json").shapes
  dotted = {path: ".".join(path if path[0] == "lm_head" else ("model", *path)) for path in shapes}
  return {dotted[path].replace("layers_", "layers."): shape for path, shape in shapes.items()}
