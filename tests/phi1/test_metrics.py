"""What a run writes down, and the arithmetic of MFU."""

import math
import re

import pytest
import torch
from training import records

from phi1.config import PRESETS
from phi1.metrics import Metrics, StepLine, duration, flops_per_token, parameter_count, peak_flops
from phi1.model import Phi1


def test_metrics_drop_what_will_be_done_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "v": 1}\n{"step": 3}\n{"st')
    metrics = Metrics(tmp_path, 2, tensorboard=False)
    metrics.record(3, loss=1.5)
    metrics.close()
    assert records(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 2, "v": 1}, {"step": 3, "loss": 1.5}]


def test_a_loss_that_is_not_finite_is_written_as_json(tmp_path):
    """And is known to have been taken."""
    metrics = Metrics(tmp_path, 0)
    metrics.record(1, validation_loss=math.nan, other=-math.inf, name="nan")
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert line == '{"step": 1, "validation_loss": null, "other": null, "name": "nan"}'
    again = Metrics(tmp_path, 1)
    assert again.validated == {"validation_loss": 1}
    again.close()


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
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA L40", None),
        ("Some GPU", None),
    ],
)
def test_the_peak_is_the_cards_own(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None  # the figures are not for it
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_the_progress_line(config):
    """MFU only where there is a peak to measure it by; what waited for data is a share of the time."""
    said = []
    facts = {"seconds": 2.0, "data_seconds": 0.5, "loss": 1.5, "lr": 1e-3, "grad_norm": 0.25}
    for load in (1e-3, None):
        progress = StepLine(config, 0, load, said.append)
        for step in (1, 2):
            progress.add(step, facts)
        # 8 sequences of 32 tokens in 2 s.
        assert progress.mfu(1, 2.0) == ({"mfu": pytest.approx(0.128)} if load else {})
    assert re.fullmatch(
        r"step 2/8  loss 1\.5000  lr 1\.00e-03  grad 0\.250  128 tokens/s  MFU 12\.8%  data 25\.0%  ETA .*", said[0]
    )
    assert "MFU" not in said[1] and "128 tokens/s  data 25.0%" in said[1]


def test_durations():
    assert [duration(s) for s in (0, 61.9, 3599, 90_061)] == ["0 m 00 s", "1 m 01 s", "59 m 59 s", "25 h 01 m"]
