"""The training loops that bench/train.py compares."""

import gc
import threading

import pytest
import torch

from bench import loops
from bench.train import model_config
from phi1.model import Phi1

SHAPE = model_config((1, 32, 64, 2, 400), dropout=0.0)


def test_plain_torch_computes_phi1() -> None:
    torch.manual_seed(0)
    plain, ours = loops.Plain(SHAPE).double().eval(), Phi1(SHAPE).double().eval()
    theirs = {name: value for name, value in plain.state_dict().items()}
    with torch.no_grad():
        for value in theirs.values():
            value.normal_(std=0.3)
        mine = {
            "embedding": "embedding.weight",
            "norm_weight": "norm.weight",
            "norm_bias": "norm.bias",
            "head_weight": "head.weight",
            "head_bias": "head.bias",
        }
        weights = {name: theirs[other] for name, other in mine.items()}
        for i in range(SHAPE.num_layers):
            block = {name.split(f"blocks.{i}.")[1]: value for name, value in theirs.items() if f"blocks.{i}." in name}
            weights |= {
                f"blocks.{i}.norm_weight": block["norm.weight"],
                f"blocks.{i}.norm_bias": block["norm.bias"],
                f"blocks.{i}.w_in": torch.cat([block["qkv.weight"], block["inner.weight"]]),
                f"blocks.{i}.b_in": torch.cat([block["qkv.bias"], block["inner.bias"]]),
                f"blocks.{i}.w_out": torch.cat([block["attention_out.weight"], block["outer.weight"]], 1),
                f"blocks.{i}.b_attention": block["attention_out.bias"],
                f"blocks.{i}.b_mlp": block["outer.bias"],
            }
    ours.load_state_dict(weights)
    tokens = torch.randint(400, (3, 33))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    torch.testing.assert_close(
        plain(inputs, targets), ours(inputs, targets=targets).double() / targets.numel(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("loop", [loops.phi1, loops.hugging_face, loops.nanogpt])
def test_a_call_is_a_step(loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the optimizer, whose state counts them; what is no longer called ends."""
    taken, step_of = [], torch.optim.AdamW.step

    def step(self, *args, **options):
        taken.append(self)
        return step_of(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    threads = threading.active_count()
    call = loop(SHAPE, 2, "cpu", "fp32", compiled=False)
    for number in (1, 2, 3):
        call()
        assert len(taken) == number
    state = next(iter(taken[0].state.values()))
    assert int(state["step"]) == 3 and state["exp_avg"].dtype == torch.float32
    del call
    gc.collect()
    for thread in threading.enumerate()[threads:]:
        thread.join(30)
    assert threading.active_count() == threads


def test_what_a_loop_raises_is_raised_by_the_call() -> None:
    def loop(turn: loops._InTurn) -> None:
        turn.begin()
        turn.stepped()
        turn.begin()
        raise ValueError("no second step")

    call = loops._InTurn(loop)
    call()
    with pytest.raises(ValueError, match="no second step"):
        call()
