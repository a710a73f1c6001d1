"""On `PYTHONPATH` it hides torch, which our users need not have, from a Python process."""

import sys

sys.modules["torch"] = None
