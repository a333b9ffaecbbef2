"""AdamW's groups and the learning rate's schedule."""

import pytest
from training import MODEL

from phi1.config import OptimizerConfig
from phi1.model import Phi1
from phi1.optimizer import learning_rate, make_optimizer


def test_weight_decay_acts_on_matrices_only():
    optimizer = make_optimizer(Phi1(MODEL), OptimizerConfig(weight_decay=0.1))
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in free["params"]} == {1}
    assert len(decayed["params"]) == 2 + 2 * MODEL.num_layers  # embedding, lm_head, w_in and w_out a layer
    assert optimizer.defaults["fused"]


def test_the_papers_learning_rates():
    paper = OptimizerConfig(lr=1e-3, warmup_steps=750)
    expected = {0: 1e-3 / 750, 374: 0.5e-3, 749: 1e-3, 750: 1e-3, 18_375: 0.5e-3, 24_000: 1e-3 * 12_000 / 35_250,
                35_999: 1e-3 / 35_250}  # fmt: skip
    assert {step: learning_rate(paper, step, 36_000) for step in expected} == pytest.approx(expected, rel=1e-12)
    floor = OptimizerConfig(lr=1e-3, lr_floor=1e-4, warmup_steps=0)
    assert learning_rate(floor, 0, 10) == 1e-3
    assert learning_rate(floor, 5, 10) == pytest.approx(5.5e-4)
    short = [learning_rate(paper, step, 100) for step in range(100)]  # --steps 100 on a recipe: all warmup
    assert short == sorted(short) and short[-1] == pytest.approx(1e-3 * 100 / 750)


def test_warmup_stable_decay():
    config = OptimizerConfig(lr=1e-3, lr_floor=1e-4, warmup_steps=4, decay_steps=5)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:16] == [1e-3] * 12
    assert rates[16:] == pytest.approx([1e-4 + 9e-4 * left / 5 for left in (4, 3, 2, 1)])
    assert [learning_rate(config, step, 30) for step in range(16)] == rates[
        :16
    ]  # more steps may be added before the decay
