"""Steps that go wrong, and what becomes of them.

A step changes nothing but the count of steps, "is skipped", if its loss or its gradient is not finite, or if no token
counts in its loss. With `train.spikes = "skip"` so is a spike: a loss or a gradient norm above the mean of the last 128
steps by more than six standard deviations (the rule and the numbers of OLMo-core's SkipStepOptimizer). Each is recorded
in metrics.jsonl with the sequences at hand.

The rule is a function of the steps before, and what it needs of them is in each checkpoint: a run that goes on from an
earlier one skips the same steps again, and does not end at them. Ten steps in a row may be skipped; then data or
weights are to blame, and the run ends.

Gradients that overflow in fp16 are no trouble: the loss scale falls until they do not.
"""

import collections
import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch

from phi1.errors import UserError

MEMORY = 128
"""Steps that a spike is measured against."""
DEVIATIONS = 6.0
"""Standard deviations above their mean that make a spike."""
IN_A_ROW = 10
"""Steps in a row that may be skipped."""


class Trouble:
    """Watches the steps of a run.

    skip_spikes: whether a spike is skipped, or only said.
    """

    def __init__(self, skip_spikes: bool, state: dict[str, Any] | None = None) -> None:
        state = state or {"skipped": [], "losses": [], "norms": []}
        self._skip_spikes = skip_spikes
        self.skipped: list[int] = state["skipped"]
        """The steps, counted from 1, that were skipped."""
        self._losses = collections.deque(state["losses"], MEMORY)
        self._norms = collections.deque(state["norms"], MEMORY)

    def state(self) -> dict[str, Any]:
        """What a run that goes on needs to know, JSON-able."""
        return {"skipped": list(self.skipped), "losses": list(self._losses), "norms": list(self._norms)}

    def judge(self, step: int, loss: float | None, norm: float) -> tuple[str | None, bool]:
        """What is wrong with step 1 …, in words (None: nothing), and whether it is to be skipped.

        loss: nats per token that counts; None: none did. norm: the gradient's.
        """
        wrong, skip = self._wrong(loss, norm)
        if loss is not None and math.isfinite(loss) and math.isfinite(norm):
            self._losses.append(loss)
            self._norms.append(norm)
        if skip:
            self.skipped.append(step)
        return wrong, skip

    def _wrong(self, loss: float | None, norm: float) -> tuple[str | None, bool]:
        if loss is None:
            return "no token counts in the loss (the loss mask is 0 throughout)", True
        if not math.isfinite(loss):
            return f"the loss is {loss}", True
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}", True
        for name, value, before in (("loss", loss, self._losses), ("gradient's norm", norm, self._norms)):
            if len(before) >= MEMORY // 2:
                limit = statistics.fmean(before) + DEVIATIONS * statistics.stdev(before)
                if value > limit:
                    return f"the {name} is {value:.4g}, a spike: above {limit:.4g}", self._skip_spikes
        return None, False

    def too_much(self, step: int) -> bool:
        """Whether more steps in a row, up to this one, were skipped than may be."""
        return self.skipped[-IN_A_ROW - 1 :] == list(range(step - IN_A_ROW, step + 1))


def require_finite(
    parameters: Iterable[tuple[str, torch.Tensor]], where: object, remedy: str = "choose an earlier or another one"
) -> None:
    """UserError, which says where and what to do, unless all parameters, given by name, are numbers."""
    for name, parameter in parameters:
        wrong = parameter.numel() - int(torch.isfinite(parameter).sum())
        if wrong:
            count = f"{wrong:,} of {parameter.numel():,}"
            raise UserError(f"{where}: weights that are NaN or infinite ({count} in {name}); {remedy}")
