"""kernels.memory: who gets huge pages is read from the process's own map of its memory."""

import re
from pathlib import Path

import pytest
import torch

from kernels import memory

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no transparent huge pages"
)


def flags(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address: hg, "huge page advise flag" (Documentation/filesystems/proc.rst)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_ask_for_huge_pages(dtype: torch.dtype) -> None:
    like = torch.zeros((), dtype=dtype)
    x = memory.empty(like, (33, 1 << 20))
    assert (x.shape, x.dtype, x.device) == ((33, 1 << 20), dtype, like.device)
    middle = x.data_ptr() + x.nbytes // 2
    assert "hg" in flags(middle)
    assert "hg" not in flags(torch.empty_like(x).data_ptr() + x.nbytes // 2)
    # Only whole huge pages inside the tensor: what lies beside it is somebody else's.
    assert "hg" not in flags(x.data_ptr() - 1) or x.data_ptr() % (2 << 20) == 0


@pytest.mark.parametrize("count", [0, 1, (4 << 20) - 1])
def test_small_tensors_do_not(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda *_: pytest.fail("advice for a small tensor"))
    assert memory.empty(torch.zeros((), dtype=torch.int8), (count,)).shape == (count,)
    assert memory.empty(torch.zeros(()), (2,), torch.int16).dtype == torch.int16


def test_advice_stays_inside_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda *a: asked.append(a))
    for megabytes in range(4, 40, 3):
        x = memory.empty(torch.zeros((), dtype=torch.int8), (megabytes << 20,))
        ((start, size, _),) = asked
        asked.clear()
        assert x.data_ptr() <= start and start + size <= x.data_ptr() + x.nbytes
        assert start % (2 << 20) == size % (2 << 20) == 0 and size >= x.nbytes - (4 << 20) + 2


def test_the_product_is_mm() -> None:
    a, b = torch.randn(2048, 33), torch.randn(1030, 33)
    assert torch.equal(memory.product(a, b.T), torch.mm(a, b.T))
    assert torch.equal(memory.product(b[:3], a.T), torch.mm(b[:3], a.T))


def test_a_result_of_no_memory_on_other_devices() -> None:
    assert memory.empty(torch.zeros(1, device="meta"), (1 << 12, 1 << 12)).device.type == "meta"
