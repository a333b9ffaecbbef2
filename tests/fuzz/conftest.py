"""The fuzzers' modules can be imported by name, as tests/kernels' can."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
