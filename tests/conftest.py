"""What must be settled before any test imports anything."""

from __future__ import annotations

import os

# Triton decides when it is first imported whether kernels are interpreted, and transformers
# imports it too: without a GPU to compile for, the interpreter is the only way to run them.
os.environ.setdefault("TRITON_INTERPRET", "1")
