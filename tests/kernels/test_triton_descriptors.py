"""Which tensors may be loaded by descriptors."""

import pytest
import torch

from kernels.triton import INTERPRETED, descriptors

CAPABLE = INTERPRETED or (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9)
DEVICE = "cpu" if INTERPRETED else "cuda"
WIDE = torch.zeros(2, 6, 4, 72, dtype=torch.bfloat16, device=DEVICE)

pytestmark = pytest.mark.skipif(not CAPABLE, reason="needs a Hopper GPU, or the interpreter")


@pytest.mark.parametrize(
    ("tensor", "allowed"),
    [
        (WIDE, True),
        (WIDE[:, :, 1:, 8:], True),
        (WIDE[..., 1:65], False),  # begins at an odd address
        (torch.zeros(2, 6, 4, 36, dtype=torch.bfloat16, device=DEVICE), False),  # heads 72 bytes apart
        (torch.zeros(2, 6, 4, 36, dtype=torch.float32, device=DEVICE), True),  # and 144
        (WIDE[:, :, :1].expand(-1, -1, 4, -1), False),  # heads 0 bytes apart
        (WIDE.transpose(2, 3), False),
        (WIDE[:0], False),
    ],
    ids=["whole", "aligned", "misaligned", "odd_rows", "wider_numbers", "expanded", "transposed", "empty"],
)
def test_allowed(tensor, allowed):
    assert descriptors.allowed(tensor) is allowed
    assert descriptors.allowed(WIDE, tensor) is allowed


def test_only_hopper_loads_by_descriptors(monkeypatch):
    monkeypatch.setattr(descriptors, "INTERPRETED", False)
    for capability, allowed in (((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert descriptors.allowed(WIDE) is allowed
