"""How Triton's candidates are timed: one that does not compile or launch counts as slow, and is named."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import triton

_log = logging.getLogger("kernels")


def bench(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
    """`do_bench` of triton.autotune: milliseconds at the quantiles of a call's time, or infinity if it raises.

    Triton itself catches a compiler's errors of three kinds; other kinds, and a driver's, would reach who called the op.
    """
    try:
        return triton.runtime.driver.active.get_benchmarker()(call, quantiles=quantiles)
    except Exception as error:  # whatever a compiler or a driver finds to say
        what = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
        _log.warning("a candidate of a Triton kernel counts as slow (%s): %s", _candidate(call), what)
        return [math.inf] * len(quantiles)


def _candidate(call: Callable[[], Any]) -> str:
    """The candidate that triton.autotune's closure runs, in words."""
    code, cells = getattr(call, "__code__", None), getattr(call, "__closure__", None) or ()
    names = dict(zip(code.co_freevars, cells, strict=True)) if code is not None else {}
    return str(names["config"].cell_contents) if "config" in names else "unnamed"
