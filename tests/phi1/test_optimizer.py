"""AdamW's groups, Muon beside it, and the learning rate's schedule."""

import copy

import pytest
import torch
from training import MODEL

from phi1.config import OptimizerConfig
from phi1.errors import UserError
from phi1.model import Phi1
from phi1.optimizer import learning_rate, make_optimizer, state_size


def test_weight_decay_acts_on_matrices_only():
    optimizer = make_optimizer(Phi1(MODEL), OptimizerConfig(weight_decay=0.1))
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in free["params"]} == {1}
    assert len(decayed["params"]) == 2 + 2 * MODEL.num_layers  # embedding, lm_head, w_in and w_out a layer
    assert optimizer.defaults["fused"]


def model(seed=0):
    found = Phi1(MODEL)
    found.reset_parameters(torch.Generator().manual_seed(seed))
    return found


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def orthogonal(gradient):
    """Muon's direction in float64 (Keller Jordan's iteration)."""
    x = gradient.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


def test_muon_moves_the_blocks_matrices_and_adamw_the_rest():
    lr, decay = 1e-2, 0.1
    by_muon, by_adamw = model(), model()
    optimizer = make_optimizer(by_muon, OptimizerConfig(algorithm="muon", lr=lr, weight_decay=decay))
    other = make_optimizer(by_adamw, OptimizerConfig(lr=lr, weight_decay=decay))
    for mine, its in ((by_muon, optimizer), (by_adamw, other)):
        give_gradients(mine, 0)
        its.step()
    before, expected, moved = dict(model().named_parameters()), dict(by_adamw.named_parameters()), []
    for name, parameter in by_muon.named_parameters():
        if parameter.dim() < 2 or not name.startswith("blocks."):
            assert torch.equal(parameter, expected[name]), name
            continue
        moved.append(name)
        scale = lr * 0.2 * max(parameter.shape) ** 0.5
        direction = (before[name] * (1 - lr * decay) - parameter).detach().double() / scale
        exact = orthogonal(parameter.grad)
        # bf16 rounds to 2^-9 what each of fifteen products writes.
        assert (direction - exact).norm() < 15 * 2**-9 * exact.norm(), name
        size = (direction * scale / lr).square().mean().sqrt()
        assert size == pytest.approx(0.2, rel=0.2)  # of an element's step in units of lr, as AdamW's commonly is
    assert len(moved) == 2 * MODEL.num_layers


def test_state_of_two_optimizers_is_loaded_to_the_bit():
    config = OptimizerConfig(algorithm="muon")
    whole = model()
    optimizer = make_optimizer(whole, config)
    for step in range(3):
        give_gradients(whole, step)
        optimizer.step()
    resumed = copy.deepcopy(whole)
    again = make_optimizer(resumed, config)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for mine, its in ((whole, optimizer), (resumed, again)):
            give_gradients(mine, step)
            for group in its.param_groups:
                group["lr"] = 1e-2 / step  # reaches both
            its.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    without = make_optimizer(copy.deepcopy(whole), config)
    assert not without.state and len(again.state) == len(list(whole.parameters()))


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_the_states_size(algorithm):
    config, mine = OptimizerConfig(algorithm=algorithm), model()
    optimizer = make_optimizer(mine, config)
    give_gradients(mine, 0)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert state_size(mine, config) == sum(value.numel() for value in kept)
    for bad in (-0.1, 1.0):
        with pytest.raises(UserError, match=rf"optimizer\.momentum = {bad}: must be "):
            OptimizerConfig(momentum=bad)


def test_a_torch_without_muon_is_named(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    make_optimizer(model(), OptimizerConfig())
    with pytest.raises(UserError, match=r"optimizer\.algorithm = 'muon': torch .* has no Muon, 2\.9 has; install it"):
        make_optimizer(model(), OptimizerConfig(algorithm="muon"))


def test_the_papers_learning_rates():
    paper = OptimizerConfig(lr=1e-3, warmup_steps=750)
    expected = {
        0: 1e-3 / 750,
        374: 0.5e-3,
        749: 1e-3,
        750: 1e-3,
        18_375: 0.5e-3,
        24_000: 1e-3 * 12_000 / 35_250,
        35_999: 1e-3 / 35_250,
    }
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
    # More steps may be added before the decay.
    assert [learning_rate(config, step, 30) for step in range(16)] == rates[:16]
