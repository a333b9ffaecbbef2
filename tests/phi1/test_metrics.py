"""What a run writes down, and the arithmetic of MFU."""

import pytest
import torch
from training import records

from phi1.config import PRESETS
from phi1.metrics import Metrics, duration, flops_per_token, parameter_count, peak_flops
from phi1.model import Phi1


def test_metrics_drop_what_will_be_done_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "v": 1}\n{"step": 3}\n{"st')
    metrics = Metrics(tmp_path, 2, tensorboard=False)
    metrics.record(3, loss=1.5)
    metrics.close()
    assert records(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 2, "v": 1}, {"step": 3, "loss": 1.5}]


def test_flops_per_token_of_phi1():
    with torch.device("meta"):
        model = Phi1(PRESETS["phi1"])
    flops = flops_per_token(PRESETS["phi1"], parameter_count(model), 2048)
    # 6 (1,418,270,720 - 51,200 x 2,048) + 12 x 24 x 2,048 x 2,048
    assert flops == 7_880_478_720 + 1_207_959_552


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_the_peak_is_the_cards_own(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found, source = peak_flops(torch.device("cuda"), torch.bfloat16)
    assert found == peak and name in source and "bfloat16" in source


def test_durations():
    assert [duration(s) for s in (0, 61.9, 3599, 90_061)] == ["0 m 00 s", "1 m 01 s", "59 m 59 s", "25 h 01 m"]
