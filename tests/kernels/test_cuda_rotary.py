"""csrc/cuda/rotary.cuh under the emulator, against the reference."""

import pytest
import torch

from kernels import apply_rotary, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "kv_heads", "half", "positions"),
    [
        ((2, 5, 3, 64), 1, 16, None),
        ((1, 1, 1, 64), 1, 32, None),
        ((2, 3, 9, 32), 4, 4, "batch"),
        ((1, 7, 2, 128), 2, 33, "shared"),
        ((3, 2, 17, 64), 17, 16, "shared"),
    ],
)
def test_rotary_is_the_reference(cuda_device, dtype, shape, kv_heads, half, positions):
    """One rounding of float32 arithmetic: the reference's bits, but for one unit in the last place of float32 (FMA)."""
    generator = torch.Generator().manual_seed(1)
    batch, seq, _, head_dim = shape
    q = torch.randn(shape, generator=generator).to(dtype)
    k = torch.randn(batch, seq, kv_heads, head_dim, generator=generator).to(dtype)
    cos, sin = reference.rotary_table(64, 2 * half)
    where = {
        None: None,
        "shared": torch.randint(64, (seq,), generator=generator),
        "batch": torch.randint(64, (batch, seq), generator=generator),
    }[positions]
    for inverse in (False, True):
        truth = reference.rotary(q.double(), k.double(), cos.double(), sin.double(), where, inverse)
        inputs = (None if x is None else x.to(cuda_device) for x in (q, k, cos, sin, where))
        ours = torch.ops.phi1.rotary(*inputs, inverse, "cuda")
        for x, y in zip(ours, truth, strict=True):
            # Half a unit in the last place of the result, and the products' float32 rounding.
            bound = y.abs() * torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
            if dtype == torch.float16:
                bound = bound.clamp_min(2**-25)
            assert ((x.cpu().double() - y).abs() <= bound * 1.001).all()


def test_rotary_takes_slices_of_a_packed_buffer(emulator):
    packed = torch.randn(2, 3, 10 * 64).to(torch.bfloat16)
    q, k, _ = (x.unflatten(-1, (-1, 64)) for x in packed.split([4 * 64, 2 * 64, 4 * 64], dim=-1))
    cos, sin = reference.rotary_table(3, 32)
    ours = apply_rotary(q, k, cos, sin, backend="cuda")
    for x, y in zip(ours, reference.rotary(q, k, cos, sin, None, False), strict=True):
        torch.testing.assert_close(x, y, rtol=2**-8, atol=1e-6)


def test_gradient_is_the_inverse_rotation(emulator):
    q = torch.randn(1, 4, 2, 64, requires_grad=True)
    k = torch.randn(1, 4, 2, 64, requires_grad=True)
    cos, sin = reference.rotary_table(4, 32)
    outputs = apply_rotary(q, k, cos, sin, backend="cuda")
    grads = [torch.randn_like(x) for x in outputs]
    ours = torch.autograd.grad(outputs, (q, k), grads)
    for x, y in zip(ours, reference.rotary(*grads, cos, sin, None, True), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_memory_requests_are_dense(emulator):
    """Whole sectors, but where a lane's 8 numbers are float32, two requests of half a sector each: cos and sin."""
    q = torch.randn(1, 8, 8, 64).to(torch.bfloat16)
    cos, sin = reference.rotary_table(8, 64)
    apply_rotary(q, q.clone(), cos, sin, backend="cuda")
    counters = emulator.counters()
    # A warp has 8 heads of a token, four lanes each: 4 sectors of a table in two requests that 2 would hold.
    warps = 8 * (8 + 8) // 8
    assert counters["global_sectors"] - counters["global_sectors_least"] == warps * 2 * 2 * 2
    emulator.reset_counters()
    apply_rotary(q[..., :32], q[..., 32:], *reference.rotary_table(8, 24), backend="cuda")  # element by element
    counters = emulator.counters()
    assert counters["global_sectors"] <= 1.5 * counters["global_sectors_least"]


def test_opcheck(emulator):
    q = torch.randn(1, 3, 2, 64)
    cos, sin = reference.rotary_table(3, 32)
    torch.library.opcheck(torch.ops.phi1.rotary, (q, q.clone(), cos, sin, None, False, "cuda"))
