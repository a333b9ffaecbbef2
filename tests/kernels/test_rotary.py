"""apply_rotary on every backend that this machine runs; on a machine without a GPU, Triton in its interpreter."""

import dataclasses

import pytest
import torch
from cpu_isa import CPU_BACKENDS
from error_rule import bound, check, error
from torch import Tensor

from kernels import BackendError, apply_rotary, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU = torch.cuda.is_available()
BACKENDS = ["reference", "torch", *CPU_BACKENDS, "triton"] + ["cuda"] * GPU


@pytest.fixture(params=BACKENDS)
def backend(request):
    """A backend's name, with the CPU backend's instruction set in use."""
    yield request.param


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend in ("triton", "cuda") else "cpu"


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    batch: int = 2
    seq: int = 5
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 32
    positions: str = ""
    """"" (index), "seq" or "batch" (given, of that shape)."""
    strided: str = ""
    """"packed": slices of one [q | k | v] buffer; "misaligned": one element further on; "transposed": last dim strided.
    """


CASES = [
    Case("phi1", seq=13, heads=4, kv_heads=4),
    Case("one", batch=1, seq=1, heads=1, kv_heads=1, head_dim=32),
    Case("gqa", seq=23, heads=6, kv_heads=2),
    Case("mqa", batch=3, seq=5, heads=6, kv_heads=1),
    Case("full", head_dim=64, rotary_dim=64),
    Case("smallest", head_dim=2, rotary_dim=2),
    Case("odd_half", heads=3, kv_heads=1, head_dim=11, rotary_dim=6),
    Case("many_heads", batch=1, seq=3, heads=35, kv_heads=17, head_dim=80),
    Case("wide", batch=1, seq=3, head_dim=256, rotary_dim=96),
    Case("long", batch=1, seq=257, heads=1, kv_heads=1),
    Case("no_tokens", seq=0),
    Case("positions", seq=9, positions="seq"),
    Case("positions_batch", batch=3, seq=9, positions="batch"),
    Case("packed", seq=9, heads=4, kv_heads=2, strided="packed"),
    Case("packed_positions", seq=9, heads=4, kv_heads=2, strided="packed", positions="batch"),
    Case("misaligned", seq=9, strided="misaligned"),
    Case("transposed", seq=9, strided="transposed"),
]


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], dict[str, Tensor]]:
    """[q, k, cos, sin] and the keyword arguments."""
    generator = torch.Generator().manual_seed(7)
    d, heads, kv_heads = case.head_dim, case.heads, case.kv_heads
    packed = torch.randn(case.batch, case.seq, (heads + 2 * kv_heads) * d + 1, generator=generator).to(dtype)
    start = 1 if case.strided == "misaligned" else 0
    q = packed[..., start : start + heads * d].unflatten(-1, (heads, d))
    k = packed[..., start + heads * d : start + (heads + kv_heads) * d].unflatten(-1, (kv_heads, d))
    if case.strided == "transposed":
        q, k = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k))
    elif not case.strided:
        q, k = q.contiguous(), k.contiguous()
    if device != "cpu" and case.strided:  # .to() keeps the strides of views that are dense only
        q, k = (torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x) for x in (q, k))
    options: dict[str, Tensor] = {}
    rows = case.seq
    if case.positions:
        rows = 4 * case.seq
        shape = (case.seq,) if case.positions == "seq" else (case.batch, case.seq)
        options["positions"] = torch.randint(rows, shape, generator=generator).to(device)
    return [x.to(device) for x in (q, k, *reference.rotary_table(rows, case.rotary_dim))], options


def rotate_plainly(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Every element by the definition (transformers' modeling_phi.py), every intermediate in x's dtype."""
    half = cos.shape[1]
    cos, sin = (t[: x.shape[1]] if positions is None else t[positions] for t in (cos, sin))
    cos, sin = (torch.cat([t, t], -1).unsqueeze(-2).to(x.dtype) for t in (cos, sin))
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    return torch.cat([head * cos + torch.cat([-head[..., half:], head[..., :half]], -1) * sin, rest], -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_gradients_obey_the_error_rule(backend, case, dtype):
    device = device_of(backend)
    inputs, options = make(case, dtype, device)
    leaves = [x.requires_grad_() for x in inputs[:2]]
    outputs = apply_rotary(*leaves, *inputs[2:], **options, backend=backend)
    plain, plain_options = make(case, dtype)
    for i, name in enumerate("qk"):
        arguments = (*plain[2:], plain_options.get("positions"))
        truth = rotate_plainly(plain[i].double(), *arguments)
        check(name, outputs[i].detach().cpu(), rotate_plainly(plain[i].detach(), *arguments), truth, dtype)
        # the gradient: a non-contiguous one, against autograd in float64
        grad = torch.randn(outputs[i].transpose(1, 3).shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        grad = grad.transpose(1, 3)
        (found,) = torch.autograd.grad(outputs[i], leaves[i], grad.to(device), retain_graph=True)
        expected = []
        for x in (plain[i].double(), plain[i].detach().clone()):
            x.requires_grad_()
            expected += torch.autograd.grad(rotate_plainly(x, *arguments), x, grad.to(x.dtype))
        check(f"d{name}", found.cpu(), expected[1], expected[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mutation", ["interleaved", "sign", "head_dim_frequency", "swapped_tables", "next_position", "rest_rotated"]
)
def test_the_tolerance_bites(mutation, dtype):
    """A wrong rotation, computed in float64 without any other error, is outside the bound."""
    (q, _, cos, sin), _ = make(Case("mutation", seq=37), dtype)
    truth = rotate_plainly(q.double(), cos, sin)
    x = q.double()
    if mutation == "interleaved":
        half = cos.shape[1]
        order = torch.arange(2 * half).view(half, 2).T.flatten()  # pairs (0, 1), (2, 3), ...
        wrong = x.clone()
        wrong[..., order] = rotate_plainly(x[..., order], cos, sin)
        wrong[..., 2 * half :] = x[..., 2 * half :]
    elif mutation == "sign":
        wrong = rotate_plainly(x, cos, -sin)
    elif mutation == "head_dim_frequency":
        wrong = rotate_plainly(x, *(t[:, :16] for t in reference.rotary_table(37, q.shape[-1])))
    elif mutation == "swapped_tables":
        wrong = rotate_plainly(x, sin, cos)
    elif mutation == "next_position":
        wrong = rotate_plainly(x, *reference.rotary_table(38, 32), positions=torch.arange(1, 38))
    else:
        wrong = rotate_plainly(x, *reference.rotary_table(37, q.shape[-1]))
    assert error(wrong, truth) > 10 * bound(rotate_plainly(q, cos, sin), truth, dtype)


def test_table_is_base_to_the_minus_2i_over_rotary_dim():
    cos, sin = reference.rotary_table(5, 6, base=100.0)
    angle = torch.tensor(4.0 * 100.0 ** (-2 * 2 / 6), dtype=torch.float64)
    assert cos.dtype == torch.float32 and cos.shape == (5, 3)
    torch.testing.assert_close(cos[4, 2], angle.cos().float(), rtol=0, atol=0)
    torch.testing.assert_close(sin[4, 2], angle.sin().float(), rtol=0, atol=0)


def test_backward_undoes_forward(backend):
    """A rotation's transpose is its inverse: the gradient with the output for gradient is the input."""
    device = device_of(backend)
    (q, k, cos, sin), options = make(Case("inverse", seq=33, positions="batch"), torch.float32, device)
    q.requires_grad_(), k.requires_grad_()
    out = apply_rotary(q, k, cos, sin, **options, backend=backend)
    back = torch.autograd.grad(out, (q, k), [x.detach() for x in out])
    for x, y in zip((q, k), back, strict=True):
        # cos^2 + sin^2 = 1 within two roundings of the tables, and four of the products: 6 * 2^-24 of |x| < 5.
        assert error(x.detach(), y) < 5 * 6 * 2**-24


def test_backends_agree_and_leave_their_inputs(backend):
    (q, k, cos, sin), _ = make(CASES[0], torch.float32, device_of(backend))
    before = q.clone(), k.clone()
    out = apply_rotary(q, k, cos, sin, backend=backend)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    assert torch.equal(out[0][..., 32:], q[..., 32:]), "dims that are not rotated pass through bit for bit"


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck_in_float64(name):
    (q, k, cos, sin), options = make(
        Case("gradcheck", seq=3, heads=3, kv_heads=1, head_dim=8, rotary_dim=6, positions="batch"), torch.float64
    )
    q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: apply_rotary(q, k, cos, sin, **options, backend=name), (q, k))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_opcheck(name, inverse):
    (q, k, cos, sin), options = make(
        Case("opcheck", seq=4, strided="packed", positions="seq"), torch.float32, device_of(name)
    )
    torch.library.opcheck(torch.ops.phi1.rotary.default, (q, k, cos, sin, options["positions"], inverse, name))
    torch.library.opcheck(torch.ops.phi1.rotary.default, (q, k, cos, sin, None, inverse, name))


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        ("torch", "inductor"),
        ("reference", "aot_eager"),
        ("cpu", "aot_eager"),
        ("cpu", "inductor"),
        ("triton", "aot_eager"),
    ],
)
def test_compiles_to_one_graph(name, compiler):
    (q, k, cos, sin), _ = make(CASES[0], torch.float32, device_of(name))

    def loss(q, k):
        a, b = apply_rotary(q, k, cos, sin, backend=name)
        return (a * a[..., :1]).sum() + (b * b[..., :1]).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_native_backends_refuse_float64():
    (q, k, cos, sin), _ = make(CASES[0], torch.float64)
    for name in ("cpu", "triton"):
        if device_of(name) == "cpu":
            with pytest.raises(
                BackendError,
                match=r"float64: native kernels take float32, bfloat16 and float16; able: reference, torch",
            ):
                apply_rotary(q, k, cos, sin, backend=name)
    out, _ = apply_rotary(q, k, cos, sin)  # the automatic choice passes them over
    assert out.dtype == torch.float64


def test_cpu_positions_outside_the_table():
    (q, k, cos, sin), _ = make(Case("outside", seq=3), torch.float32)
    for bad in (-1, 3):
        with pytest.raises(IndexError, match=rf"{bad}.*rows 0..2"):
            apply_rotary(q, k, cos, sin, positions=torch.tensor([0, 1, bad]), backend="cpu")


_Q, _K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 8)
_COS = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("q", "k", "cos", "sin", "positions", "message"),
    [
        (_Q[0], _K, _COS, _COS, None, r"q.shape = \(3, 4, 8\): must be \(batch, seq, heads, head_dim\)"),
        (_Q, _K[0], _COS, _COS, None, r"k.shape = \(3, 2, 8\): must be \(batch, seq, kv_heads, head_dim\)"),
        (_Q.int(), _K, _COS, _COS, None, r"q.dtype = torch.int32: must be float64"),
        (_Q, _K.half(), _COS, _COS, None, r"k.dtype = torch.float16, q.dtype = torch.float32: must be equal"),
        (_Q, _K[:, :2], _COS, _COS, None, r"k.shape = \(2, 2, 2, 8\): must be \(2, 3, kv_heads, 8\)"),
        (_Q, _K, _COS[0], _COS, None, r"cos.shape = \(2,\): must be \(positions, rotary_dim / 2\)"),
        (_Q, _K, _COS, _COS[:2], None, r"sin.shape = \(2, 2\): must be cos.shape = \(3, 2\)"),
        (_Q, _K, _COS.half(), _COS.half(), None, r"cos.dtype = torch.float16: must be float32"),
        (_Q, _K, torch.zeros(3, 5), torch.zeros(3, 5), None, r"rotary_dim = 10 must be in 2..8, head_dim"),
        (_Q, _K, _COS[:2], _COS[:2], None, r"3 tokens need 3 rows; build a longer rotary_table"),
        (_Q, _K, _COS, _COS, torch.zeros(3), r"positions = torch.float32 \(3,\): must be int64"),
        (_Q, _K, _COS, _COS, torch.zeros(3, 2).long(), r"positions = torch.int64 \(3, 2\): must be int64 of shape"),
        (_Q, _K.to("meta"), _COS, _COS, None, r"k is on meta, q on cpu"),
    ],
)
def test_bad_input(q, k, cos, sin, positions, message):
    with pytest.raises(ValueError, match=message):
        apply_rotary(q, k, cos, sin, positions=positions)
