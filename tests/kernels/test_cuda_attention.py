"""csrc/cuda's flash attention under the emulator, by the rule of attention_cases."""

import dataclasses
import sys

import attention_cases
import pytest
import torch
from attention_cases import CASES, OUTPUTS, Case
from emulator import DEVICES, check_attention

from kernels import BackendError, cuda, flash_attention, reference, registry
from kernels.machine import Machine

DTYPES = (torch.bfloat16, torch.float16)
# head_dim 32 has no hopper kernel.
VERSIONS_AND_CASES = [
    pytest.param(version, case, dtype, id=f"{version}-{case.name}-dtype{number}")
    for version in cuda.ATTENTION_VERSIONS
    for case in CASES
    for number, dtype in enumerate(DTYPES)
    if version == "mma"
    or (version == "hopper" and case.head_dim != 32)
    # Other calls of hopper_wide are hopper's. Its 16-bit types part where hopper's do.
    or (case.head_dim == 64 and not case.dropout_p and (dtype == torch.bfloat16 or "cuda" in DEVICES))
]
_version = "cuda/mma"  # that a test chose
VERSIONS_AND_DIMS = [("mma", 32), ("mma", 64), ("mma", 128), ("hopper", 64), ("hopper", 128)]
HOPPER = "cuda" in DEVICES and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture
def force(monkeypatch):
    """A function that makes the calls of this test take one version of the kernels."""

    def force(version, device="cpu"):
        if version != "mma" and device == "cuda" and not HOPPER:
            pytest.skip("the GPU has not compute capability 9.0: the hopper kernels are tested under the emulator")
        monkeypatch.setattr(sys.modules[__name__], "_version", f"cuda/{version}")

    return force


@pytest.mark.parametrize(("version", "case", "dtype"), VERSIONS_AND_CASES)
def test_attention_keeps_the_error_rule(cuda_device, request, force, version, case, dtype):
    force(version, cuda_device)
    check_attention(case, dtype, cuda_device, _version)
    if cuda_device == "cuda":
        return
    counters = request.getfixturevalue("emulator_module").counters()  # built only where it is used
    assert counters["launches"] == 4, "forward, rows' numbers, dK and dV, dQ"
    assert counters["shared_wavefronts"] == counters["shared_wavefronts_least"] > 0, "bank conflicts"


@pytest.mark.parametrize(("version", "head_dim"), VERSIONS_AND_DIMS)
def test_bits_do_not_depend_on_the_order_of_threads(emulator, force, version, head_dim):
    force(version)
    case = Case("order", batch=1, seqlen_q=170, seqlen_k=300, heads=2, kv_heads=1, head_dim=head_dim, dropout_p=0.1)
    first = attention_cases.run_case(case, torch.bfloat16, _version)
    for seed in range(1, 9):
        emulator.set_seed(seed)
        again = attention_cases.run_case(case, torch.bfloat16, _version)
        for name in OUTPUTS:
            assert torch.equal(first[name], again[name]), (name, seed)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU; thread orders are tested under the emulator")
@pytest.mark.parametrize(("version", "head_dim"), VERSIONS_AND_DIMS)
def test_repeated_runs_on_the_gpu_give_the_same_bits(force, version, head_dim):
    force(version, "cuda")
    case = Case("repeat", batch=2, seqlen_q=500, seqlen_k=700, heads=4, kv_heads=2, head_dim=head_dim, dropout_p=0.1)
    first = attention_cases.run_case(case, torch.bfloat16, _version, "cuda")
    for _ in range(50):
        again = attention_cases.run_case(case, torch.bfloat16, _version, "cuda")
        assert all(torch.equal(first[name], again[name]) for name in OUTPUTS)


@pytest.mark.parametrize(("version", "head_dim"), VERSIONS_AND_DIMS)
@pytest.mark.parametrize("documents", ((), ((40, 40), (33, 50))))
def test_dropout_mask_is_the_reference_bit_for_bit(emulator, force, version, head_dim, documents):
    """With q = 0 every probability is 1 / n, and with v = the identity's columns out is the row's mask itself."""
    force(version)
    columns = 50
    case = Case(
        "mask",
        batch=1,
        seqlen_q=40,
        seqlen_k=columns,
        heads=2,
        kv_heads=1,
        head_dim=head_dim,
        causal=False,
        dropout_p=0.3,
        documents=documents,
    )
    q, k, v, _, options = attention_cases.make_inputs(case, torch.float16)
    q.zero_()
    for first in range(0, columns, head_dim):  # which keys this pass looks at
        v.zero_()
        starts = (0,) if not documents else (0, documents[0][1])
        lengths = (columns,) if not documents else tuple(n for _, n in documents)
        for start, length in zip(starts, lengths, strict=True):
            for j in range(first, min(first + head_dim, length)):
                v[0, start + j, 0, j - first] = 1.0
        out = flash_attention(q, k, v, **options, backend=_version)
        truth, _ = reference.attention_forward(
            q,
            k,
            v,
            options.get("cu_seqlens_q"),
            options.get("cu_seqlens_k"),
            False,
            head_dim**-0.5,
            0.3,
            attention_cases.SEED,
        )
        assert torch.equal(out == 0, truth == 0)
        assert 0.2 < (out[..., : min(head_dim, columns - first)] == 0).float().mean() < 0.6


@pytest.mark.parametrize("head_dim", (32, 64, 128))
@pytest.mark.parametrize("documents", ((), ((40, 40), (33, 50))))
def test_dropout_mask_of_dv_is_the_reference_bit_for_bit(emulator, head_dim, documents):
    """With q = 0 every probability is 1 / n, and with grad_out = the identity's columns dv is the mask, transposed."""
    case = Case(
        "mask",
        batch=1,
        seqlen_q=45,
        seqlen_k=70,
        heads=2,
        kv_heads=1,
        head_dim=head_dim,
        causal=False,
        dropout_p=0.3,
        documents=documents,
    )
    q, k, v, grad, options = attention_cases.make_inputs(case, torch.float16)
    q.zero_()
    starts = (0,) if not documents else (0, documents[0][0])
    lengths = (45,) if not documents else tuple(m for m, _ in documents)
    for first in range(0, 45, head_dim):  # which queries this pass looks at
        for head in range(2):
            grad.zero_()
            for start, length in zip(starts, lengths, strict=True):
                for i in range(first, min(first + head_dim, length)):
                    grad[0, start + i, head, i - first] = 1.0
            found = []
            for backend in ("cuda", "reference"):
                leaf = v.clone().requires_grad_()
                found.append(
                    torch.autograd.grad(flash_attention(q, k, leaf, **options, backend=backend), leaf, grad)[0]
                )
            assert torch.equal(found[0] == 0, found[1] == 0)
            kept = found[1][0, :, 0, 0] != 0  # by the first query of this pass
            assert first >= 40 or 0.3 < kept[: case.seqlen_k if not documents else 40].float().mean() < 0.95


def test_gradients_flow_through_strided_grad_out(emulator):
    """`grad_out` that is not contiguous gives the gradients of its contiguous copy."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 33, 2, 64, generator=generator).to(torch.bfloat16).requires_grad_() for _ in range(3))
    out = flash_attention(q, k, v, backend=_version)
    for grad_out in (
        torch.randn(1, 2, 33, 64, generator=generator).to(torch.bfloat16).transpose(1, 2),
        torch.randn(1, 1, 2, 1, generator=generator).to(torch.bfloat16).expand(1, 33, 2, 64),
    ):
        ours = torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True)
        dense = torch.autograd.grad(out, (q, k, v), grad_out.contiguous(), retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(ours, dense, strict=True))


@pytest.mark.parametrize("version", cuda.ATTENTION_VERSIONS)
def test_writes_into_a_slice_of_another_tensor(emulator, force, version):
    force(version)
    q, k, v = (torch.randn(1, 20, 2, 64).to(torch.bfloat16) for _ in range(3))
    wide = torch.zeros(1, 20, 4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        flash_attention(q, k, v, out=wide[:, :, 1:3], backend=_version)
    assert torch.equal(wide[:, :, 1:3], flash_attention(q, k, v, backend=_version))
    assert not wide[:, :, 0].any() and not wide[:, :, 3].any()


@pytest.mark.parametrize("version", cuda.ATTENTION_VERSIONS)
def test_nan_in_the_inputs_reaches_the_output(emulator, force, version):
    force(version)
    q, k, v = (torch.randn(1, 9, 1, 64).to(torch.bfloat16) for _ in range(3))
    q[0, 4, 0, 7] = float("nan")
    out = flash_attention(q, k, v, backend=_version)
    assert out[0, 4].isnan().all() and not out[0, :4].isnan().any()


def test_compiles_to_one_graph(emulator):
    def loss(q, k, v):
        return flash_attention(q, k, v, dropout_p=0.1, dropout_seed=5, backend=_version).float().square().sum()

    q, k, v = (torch.randn(1, 17, 2, 32).to(torch.bfloat16).requires_grad_() for _ in range(3))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager_grads = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for x, y in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), eager_grads, strict=True):
        torch.testing.assert_close(x, y)


def test_opcheck(emulator):
    q, k, v = (torch.randn(1, 5, 2, 32).to(torch.bfloat16) for _ in range(3))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    for documents, seed in (((None, None), torch.tensor(7)), ((cu, cu), None)):
        options = (*documents, seed, True, 0.2, 0.1, 7, "cuda")
        torch.library.opcheck(torch.ops.phi1.attention_forward, (q, k, v, *options))
        out, lse = torch.ops.phi1.attention_forward(q, k, v, *options)
        torch.library.opcheck(torch.ops.phi1.attention_backward, (q, q, k, v, out, lse, *options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, r"dtype = torch.float32: the kernels multiply bfloat16 or float16"),
        ({"head_dim": 48}, r"head_dim = 48: the kernels are made for 32, 64, 128"),
    ],
)
def test_what_the_kernels_are_not_made_for_is_refused(emulator, change, message):
    dtype, head_dim = change.get("dtype", torch.bfloat16), change.get("head_dim", 64)
    x = torch.zeros(1, 4, 1, head_dim, dtype=dtype)
    with pytest.raises(BackendError, match=message):
        flash_attention(x, x, x, backend=_version)


def test_a_grid_too_large_is_refused_with_the_kernels_name(emulator_module):
    x = torch.empty(0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"CUDA kernel attention_forward: 4294967296 tiles: must be in 1..2147483647"):
        emulator_module.attention_forward_cuda(
            x, x, x, x, None, (2**31, 2, 2, 2, 2, 64), (None, None, 0), True, 1.0, (0, 1.0, 0, None), 1, 0, 0
        )


@pytest.mark.parametrize("version", cuda.ATTENTION_VERSIONS)
def test_global_memory_is_read_in_whole_sectors(emulator, force, version):
    """16 bytes a lane, whole rows: no sector of 32 bytes is fetched for half of it, forward and backward."""
    force(version)
    case = dataclasses.replace(CASES[0], name="sectors", seqlen_q=128, seqlen_k=128)
    attention_cases.run_case(case, torch.bfloat16, _version)
    counters = emulator.counters()
    # The rows' numbers are read by 8 lanes at 8 different places: the only requests that are not dense.
    assert counters["global_sectors"] <= 1.01 * counters["global_sectors_least"]


def test_nan_in_a_neighbouring_document_stays_there(emulator, force):
    """A tile of 128 keys reaches over the end of a document: what lies there is not even multiplied by zero."""
    force("hopper")
    q, k, v = (torch.randn(1, 60, 1, 64).to(torch.bfloat16) for _ in range(3))
    cu = torch.tensor([0, 33, 60], dtype=torch.int32)
    clean = flash_attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, backend=_version)
    for x in (k, v):
        x[:, 33:] = float("nan")
    out = flash_attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, backend=_version)
    assert torch.equal(out[:, :33], clean[:, :33]) and out[:, 33:].isnan().all()


def test_a_version_that_cannot_serve_is_refused(emulator):
    x = torch.zeros(1, 4, 1, 32, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="head_dim = 32: the hopper kernels are made for 64 and 128; able: "):
        flash_attention(x, x, x, backend="cuda/hopper")
    with pytest.raises(BackendError, match=r"backend = 'cuda/wgmma': must be one of .*cuda/mma"):
        flash_attention(x, x, x, backend="cuda/wgmma")


def test_hopper_needs_its_card_and_its_build():
    def on(forced="cuda/hopper", **machine):
        return registry.select(
            "flash_attention",
            Machine("cuda", "a GPU", "a GPU", **machine),
            forced,
            dtype=torch.bfloat16,
            head_dim=64,
        )

    assert on(capability=(9, 0)) == on("cuda", capability=(9, 0)) == "cuda/hopper"
    assert on("cuda/hopper_wide", capability=(9, 0)) == "cuda/hopper_wide"
    with pytest.raises(BackendError, match=r"a GPU has not compute capability 9\.0"):
        on(capability=(10, 0))
    missing = {"cuda/hopper": "this build has no hopper kernels"}
    with pytest.raises(BackendError, match="this build has no hopper kernels"):
        on(capability=(9, 0), missing=missing)


def test_an_unknown_version_is_refused_by_the_module(emulator_module):
    x = torch.empty(0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"attention: version = 3: this build has 0 \(mma\) to 2 \(hopper\)"):
        emulator_module.attention_forward_cuda(
            x, x, x, x, None, (1, 2, 2, 2, 2, 64), (None, None, 0), True, 1.0, (0, 1.0, 0, None), 1, 0, 3
        )
