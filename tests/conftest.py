"""Shared by all tests: helper modules in tests/kernels, tests/csrc/emulator and tests/servers can be imported by name;
Triton runs without a GPU; Ctrl-C works.
"""

import os
import pathlib
import signal
import sys
import tempfile

import torch

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that send it would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)
for folder in ("kernels", "csrc/emulator", "servers"):
    sys.path.insert(0, str(pathlib.Path(__file__).parent / folder))
# What `phi1 tune` measured for this user is not what the tests expect of the choice.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="phi1-tests-")
if not torch.cuda.is_available():
    # Must be set before triton is imported: its kernels then run on the CPU, in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
