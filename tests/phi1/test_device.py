"""What the names of devices mean, on machines with and without a GPU."""

import pytest
import torch

from phi1.device import resolve
from phi1.errors import UserError


@pytest.mark.parametrize(
    ("gpus", "name", "found"),
    [(0, "auto", "cpu"), (2, "auto", "cuda"), (2, "cpu", "cpu"), (2, "cuda", "cuda"), (2, "cuda:1", "cuda:1")],
)
def test_names(gpus: int, name: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert resolve(name, "--device") == torch.device(found)


@pytest.mark.parametrize(
    ("gpus", "name", "message"),
    [
        (2, "gpu", r"^--device = 'gpu': must be auto, cpu, cuda or cuda:N$"),
        (2, "meta", r"^--device = 'meta': must be auto, cpu, cuda or cuda:N$"),
        (0, "cuda", r"^--device = 'cuda': no GPU that torch can use here; choose auto or cpu$"),
        (2, "cuda:2", r"^--device = 'cuda:2': this machine has 2 GPUs$"),
    ],
)
def test_what_is_no_device_here(gpus: int, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=message):
        resolve(name, "--device")
