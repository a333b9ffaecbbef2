"""How Triton's candidates are timed: one that does not compile or launch counts as slow, and is named."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import triton

_log = logging.getLogger("kernels")
_compile_only = False


def compile_only() -> None:
    """From here on this process compiles and calls each candidate once, times none, and keeps no winner on disk.

    To be called before the modules with kernels are imported.
    """
    global _compile_only
    _compile_only = True


def tuned(
    configs: list[triton.Config], key: list[str], prune: Callable[..., list[triton.Config]]
) -> Callable[[Any], Any]:
    """Decorator: times the candidates at the first call of each kind and keeps the winner on disk, beside Triton's
    other files.
    """
    return triton.autotune(
        configs,
        key=key,
        prune_configs_by={"early_config_prune": prune},
        cache_results=not _compile_only,
        do_bench=bench,
    )


def bench(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
    """`do_bench` of triton.autotune: milliseconds at the quantiles of a call's time, or infinity if it raises.

    Triton itself catches a compiler's errors of three kinds; other kinds, and a driver's, would reach who called the
    op.
    """
    try:
        if _compile_only:
            call()
            return [0.0] * len(quantiles)
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
