"""AdamW as phi-1 was trained with it, Muon beside it, and the learning rate's course (section 2.3 of the paper)."""

from typing import Any

import torch

from phi1.config import OptimizerConfig
from phi1.errors import UserError
from phi1.model import Phi1


class Together(torch.optim.Optimizer):
    """Several optimizers as one: groups, state and steps are theirs, each with parameters of its own."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Makes each optimizer's groups and state those of this one, whose order of groups is the optimizers'."""
        groups = iter(self.param_groups)
        for optimizer in self._optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; it puts new groups and state in place of those that were."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of each."""
        assert closure is None
        for optimizer in self._optimizers:
            optimizer.step()


def make_optimizer(model: Phi1, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW over the model's parameters, where they are now; with "muon" torch's Muon over the matrices of the
    blocks.

    Weight decay acts on matrices, the embedding and lm_head among them (as in nanoGPT and transformers' Trainer),
    and not on biases and LayerNorms, which have no scale for it to control. It is decoupled: a step takes lr *
    weight_decay off a weight, whichever moves it.

    Muon moves a matrix (rows, columns) by the nearest orthogonal one of its momentum, times 0.2 sqrt(max(rows,
    columns)): a root mean square of 0.2 an element, about AdamW's, so that one lr and one weight decay serve both
    ("Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2). A block's two matrices are moved as they are
    stored, q, k, v and the MLP's inner layer as one.
    """
    muons = _by_muon(model, config)
    known = {id(parameter) for parameter in muons}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    if not muons:
        return adamw
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"optimizer.algorithm = 'muon': torch {torch.__version__} has no Muon, 2.9 has; install it, or take adamw"
        )
    muon = torch.optim.Muon(
        muons, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"
    )
    return Together(muon, adamw)


def state_size(model: Phi1, config: OptimizerConfig) -> int:
    """Numbers that the optimizer keeps: two moments a parameter, or one momentum where Muon moves it."""
    return 2 * sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in _by_muon(model, config))


def _by_muon(model: Phi1, config: OptimizerConfig) -> list[torch.nn.Parameter]:
    return [p for p in model.blocks.parameters() if p.dim() == 2] if config.algorithm == "muon" else []


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 … steps - 1.

    It rises linearly, reaching `lr` in the last of the warmup steps, stays there until `decay_steps` are left (0: not
    at all), and falls linearly towards `lr_floor`, which it would reach at step `steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    remaining = min(1.0, (steps - step) / (config.decay_steps or steps - config.warmup_steps))
    return config.lr_floor + (config.lr - config.lr_floor) * remaining
