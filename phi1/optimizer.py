"""AdamW as phi-1 was trained with it, and the learning rate's course (section 2.3 of the paper)."""

import torch

from phi1.config import OptimizerConfig
from phi1.model import Phi1


def make_optimizer(model: Phi1, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the model's parameters, where they are now.

    Weight decay acts on matrices, the embedding and lm_head among them (as in nanoGPT and transformers' Trainer),
    and not on biases and LayerNorms, which have no scale for it to control.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 … steps - 1.

    It rises linearly, reaching `lr` in the last of the warmup steps, stays there until `decay_steps` are left (0: not at
    all), and falls linearly towards `lr_floor`, which it would reach at step `steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    remaining = min(1.0, (steps - step) / (config.decay_steps or steps - config.warmup_steps))
    return config.lr_floor + (config.lr - config.lr_floor) * remaining
