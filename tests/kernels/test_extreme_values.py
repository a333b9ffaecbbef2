"""What a model may give: large scores, scores of -inf and NaN, logits of -inf, numbers at their type's edge.

Every backend gives what `reference` gives in float64. Numbers are such that the scores are exact in float32: what is
checked is the softmax, and its bounds are the roundings of its results.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from cpu_isa import CPU_BACKENDS
from emulator import as_cuda_backend, build, load
from torch import Tensor

from kernels import BlockShape, flash_attention, linear_cross_entropy, native, parallel_block, reference

BACKENDS = [*CPU_BACKENDS, "cuda", "triton"]
ATTENTION = [*BACKENDS, "cuda/hopper"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(scope="module")
def emulated():
    return load(build())


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend's name; the CPU's instruction set, or the emulator as `cuda`, is in use until the test ends."""
    with contextlib.ExitStack() as stack:
        if request.param.startswith("cuda"):
            stack.enter_context(as_cuda_backend(request.getfixturevalue("emulated")))
        yield request.param


def served(backends: list[str], dtypes: list[torch.dtype]) -> list[tuple[str, torch.dtype]]:
    """The pairs that there are: the cuda backend's attention takes 16 bits."""
    pairs = itertools.product(backends, dtypes)
    return [(name, dtype) for name, dtype in pairs if not (name.startswith("cuda") and dtype == torch.float32)]


of_attention = pytest.mark.parametrize(("backend", "dtype"), served(ATTENTION, DTYPES), indirect=["backend"], ids=str)


def attention(backend: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **options: object) -> dict[str, Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = flash_attention(q, k, v, return_lse=True, backend=backend, **options)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, (q, k, v), grad)
    return dict(zip(NAMES, (out.detach(), lse, *grads), strict=True))


def compare(
    found: dict[str, Tensor],
    truth: dict[str, Tensor],
    dtype: torch.dtype,
    skip: tuple[str, ...] = (),
    terms: dict[str, float] | None = None,
    known: float = 1.0,
) -> None:
    """NaN and infinities where the truth has them; elsewhere within roundings of the greatest number or term.

    known: probabilities are known to this many epsilons of float32, the size of scores that are not exact.
    """
    for name in set(truth) - set(skip):
        a, b = found[name].double(), truth[name].double()
        finite = b.isfinite()
        assert torch.equal(a[~finite].nan_to_num(1.5), b[~finite].nan_to_num(1.5)), (name, a, b)
        assert a[finite].isfinite().all(), (name, a)
        if finite.any():
            eps = torch.finfo(torch.float32 if name == "lse" else dtype).eps + torch.finfo(torch.float32).eps * known
            bound = 4 * eps * max(float(b[finite].abs().max()), (terms or {}).get(name, 0.0)) + 1e-6
            assert float((a - b)[finite].abs().max()) <= bound, (name, float((a - b)[finite].abs().max()), bound)


def both(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    skip: tuple[str, ...] = (),
    known: float = 1.0,
    truth_dtype: torch.dtype = torch.float64,
    **options: object,
) -> None:
    """The backend against reference."""
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(q.dtype)
    truth = attention("reference", *(x.to(truth_dtype) for x in (q, k, v, grad)), **options)
    # dS = P (dO V^T - delta) is a difference of numbers of sqrt(64); times K it is dQ.
    scale = abs(options.get("scale", 0.125))  # type: ignore[arg-type]
    terms = {name: 8 * scale * float(x[x.isfinite()].abs().max()) for name, x in (("dq", k), ("dk", q))}
    terms["dk"] *= q.shape[1] ** 0.5  # a sum over the queries
    compare(attention(backend, q, k, v, grad, **options), truth, q.dtype, skip, terms, known)


def values(n: int, dtype: torch.dtype, heads: int = 1) -> Tensor:
    return torch.randn(1, n, heads, 64, generator=torch.Generator().manual_seed(5)).to(dtype)


@of_attention
@pytest.mark.parametrize("queries", [1, 20, 150])
@pytest.mark.parametrize("score", [-88.8, -266.4, -444.0])
def test_any_greatest_score(score: float, queries: int, dtype: torch.dtype, backend: str) -> None:
    """The greatest score of the first keys may be anything: not only what exp2 of its negative can hold."""
    q, n = torch.ones(1, queries, 1, 64, dtype=dtype), max(queries, 40)
    k = torch.full((1, n, 1, 64), score / 8, dtype=dtype)
    both(backend, q, k, values(n, dtype), known=4 * abs(score) + 1)  # a sum of 64 terms


@pytest.mark.parametrize(("name", "dtype"), served([*ATTENTION, "torch"], DTYPES), ids=str)
def test_a_scale_of_zero_has_gradients_of_zero(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """However large dS k is: in fp16 beyond its range, here. Each row's output is the mean of the values."""
    q, v = values(5, dtype), values(40, dtype)
    k = torch.full((1, 40, 1, 64), 30000.0, dtype=dtype)
    k[:, ::2] *= -1
    leaves = [x.requires_grad_() for x in (q, k, v)]
    backend = (
        as_cuda_backend(request.getfixturevalue("emulated")) if name.startswith("cuda") else contextlib.nullcontext()
    )
    with backend:
        out = flash_attention(*leaves, scale=0.0, causal=False, backend=name)
        dq, dk, _ = torch.autograd.grad(out, leaves, 8 * torch.ones_like(out))
    torch.testing.assert_close(out[0].double(), v.double().mean(1)[0].expand(5, 1, 64), rtol=1e-2, atol=1e-2)
    assert not dq.any() and not dk.any()


@pytest.mark.parametrize(
    ("backend", "dtype", "exponent"),
    [
        (backend, dtype, exponent)
        for backend, dtype in served(ATTENTION, DTYPES)
        for exponent in (20, 27, 31, 60, 100)
        if dtype != torch.float16 or exponent < 30  # it has no such scores
    ],
    indirect=["backend"],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.125, -0.3])
@pytest.mark.parametrize("queries", [3, 70])
def test_large_scores(queries: int, exponent: int, scale: float, dtype: torch.dtype, backend: str) -> None:
    """A row of scores around 2^exponent keeps its greatest, forward and backward."""
    generator = torch.Generator().manual_seed(exponent)
    half = 2.0 ** (exponent // 2)
    q, k = torch.zeros(1, queries, 1, 64), torch.zeros(1, 100, 1, 64)
    q[..., 7] = (1 + torch.arange(queries)[None, :, None] % 32 / 32) * half  # roundings of either sign
    order = torch.randperm(100, generator=generator)
    k[..., 7] = (order[None, :, None] - 50) / 64 * 2.0 ** (exponent - exponent // 2)  # distinct, exact in 16 bits
    both(
        backend,
        q.to(dtype),
        k.to(dtype),
        values(100, dtype),
        scale=scale,
        known=2.0**exponent if exponent < 24 else 1.0,
    )


@of_attention
@pytest.mark.parametrize("queries", [1, 16, 60])
@pytest.mark.parametrize("case", ["all", "first_keys", "one_row", "infinite_keys", "nan_row", "plus_inf_row"])
def test_scores_that_are_not_finite(case: str, queries: int, dtype: torch.dtype, backend: str) -> None:
    """A row without a score above -inf is zeros with lse -inf; NaN stays in its row; +inf makes NaN, with lse +inf."""
    n = 200
    q, k, v = values(queries, dtype), values(n, dtype).flip(3), values(n, dtype)
    big = 2.0**64  # whose square is infinite in float32
    skip: tuple[str, ...] = ()
    if case == "infinite_keys":  # 0 times infinity in the gradients of the others
        q[..., 0] = 1.0
        k[:, :150, :, 0] = -math.inf
        skip = ("dq", "dk")
    elif case == "nan_row":
        q[:, queries // 2, :, 3] = math.nan
        skip = ("dk", "dv")
    else:
        if dtype == torch.float16:  # no two finite numbers of fp16 make an infinite score
            big = math.inf
            skip = ("dq", "dk", "dv")
        rows = slice(queries // 2, queries // 2 + 1) if case in ("one_row", "plus_inf_row") else slice(None)
        q[..., :2], k[..., :2] = 0.0, 0.0
        q[:, rows, :, :2] = big if dtype != torch.float16 else 1.0
        keys = slice(0, 150) if case == "first_keys" else slice(None)
        k[:, keys, :, :2] = -big
        if case == "plus_inf_row":
            k[:, 5, :, :2] = big
            skip = ("dq", "dk", "dv")
    # Products of finite numbers that are infinite in float32 are not in float64.
    truth_dtype = torch.float32 if case in ("all", "first_keys", "one_row", "plus_inf_row") else torch.float64
    known = 40.0  # the size of the other scores
    both(backend, q, k, v, skip, known, truth_dtype, scale=1.0)


def check_extreme_scores(backend: str, dtype: torch.dtype) -> None:
    """A few of the calls above, for mutations: greatest scores of -88.7, lone ones of 2^40, none but -inf, and +inf."""
    q, k, v = torch.ones(1, 20, 1, 64, dtype=dtype), torch.full((1, 40, 1, 64), -11.1, dtype=dtype), values(40, dtype)
    both(backend, q, k, v, known=360.0)
    large = torch.zeros(1, 40, 1, 64)
    large[..., 7] = (torch.randperm(40, generator=torch.Generator().manual_seed(1))[None, :, None] - 20) / 64 * 2.0**20
    for exponent in (20, 40):
        q = torch.zeros(1, 20, 1, 64)
        q[..., 7] = (1 + torch.arange(20)[None, :, None] / 32) * 2.0**exponent  # roundings of either sign
        both(backend, q.to(dtype), large.to(dtype), v, scale=0.3)
    q = values(20, dtype)
    q[..., 0] = 1.0
    for infinity in (-math.inf, math.inf):
        k = values(40, dtype).flip(3)
        k[:, slice(None) if infinity < 0 else slice(3, 4), :, 0] = infinity
        both(backend, q, k, v, ("dq", "dk") if infinity < 0 else ("dq", "dk", "dv"), 40.0, scale=1.0)


# ------------------------------------------------------------------------------------------------- the loss


def loss(backend: str, h: Tensor, w: Tensor, b: Tensor, targets: Tensor, z_loss: float) -> dict[str, Tensor]:
    h, w, b = (x.detach().clone().requires_grad_() for x in (h, w, b))
    value = linear_cross_entropy(h, w, b, targets, reduction="sum", z_loss=z_loss, backend=backend)
    names = ("loss", "dhidden", "dweight", "dbias")
    return dict(zip(names, (value.detach()[None], *torch.autograd.grad(value, (h, w, b))), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("case", ["first_1024", "first_4096", "most", "last", "target", "all", "plus_inf", "nan"])
def test_infinite_logits(case: str, z_loss: float, dtype: torch.dtype, backend: str) -> None:
    """As reference: columns of -inf, which padding makes, have probability 0 wherever they lie."""
    rows, columns, width = 3, 4136, 16
    generator = torch.Generator().manual_seed(2)
    # Small integers and quarters: products and their sums are exact in every dtype.
    h = torch.randint(-2, 3, (rows, width), generator=generator).to(dtype)
    w = (torch.randint(-2, 3, (columns, width), generator=generator) / 4).to(dtype)
    b = (torch.randint(-4, 5, (columns,), generator=generator) / 4).to(dtype)
    targets = torch.tensor([4130, 4131, 4128])
    hidden = {
        "first_1024": slice(0, 1024),
        "first_4096": slice(0, 4096),
        "most": slice(0, 4128),
        "last": slice(4132, None),
    }
    if case in hidden:
        b[hidden[case]] = -math.inf
    elif case == "all":
        b[:] = -math.inf
    else:
        b[4131] = {"target": -math.inf, "plus_inf": math.inf, "nan": math.nan}[case]
    truth = loss("reference", h.double(), w.double(), b.double(), targets, z_loss)
    found = loss(backend, h, w, b, targets, z_loss)
    if case in ("all", "plus_inf", "nan"):
        assert all(x.isnan().all() for x in truth.values()) or case == "nan"
        for name in truth:
            assert torch.equal(found[name].isnan(), truth[name].isnan()), name
    else:
        compare(found, truth, dtype)


# ------------------------------------------------------------------------------------------------- GELU, rotary


@pytest.mark.parametrize(
    ("backend", "dtype"), served(BACKENDS, [torch.float32, torch.bfloat16]), indirect=["backend"], ids=str
)
@pytest.mark.parametrize("power", [4, 19, 20, 37])
def test_gelu_far_out(power: int, dtype: torch.dtype, backend: str) -> None:
    """u of either sign and any size: 0 or u, with slope 0 or 1, also where u^2 is infinite."""
    hidden, inner, dim = 64, 64, 32
    x = torch.randn(1, 3, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    w_in, b_in = torch.zeros(3 * dim + inner, hidden, dtype=dtype), torch.zeros(3 * dim + inner, dtype=dtype)
    b_in[3 * dim :] = torch.tensor([10.0**power, -(10.0**power)] * (inner // 2))
    w_out = torch.zeros(hidden, dim + inner, dtype=dtype)
    w_out[:, dim:] = torch.eye(hidden)
    parameters = [
        torch.ones(hidden, dtype=dtype),
        torch.zeros(hidden, dtype=dtype),
        w_in,
        b_in.requires_grad_(),
        w_out,
        torch.zeros(hidden, dtype=dtype),
    ]
    table = reference.rotary_table(3, 16)
    y = parallel_block(x, *parameters, *table, BlockShape(1, 1, dim), backend=backend)
    expected = x.double() + b_in.double().clamp(min=0)[3 * dim :]
    assert float(((y.double() - expected) / (1 + expected.abs())).abs().max()) <= 2 * torch.finfo(dtype).eps
    (slope,) = torch.autograd.grad(y.float().sum(), b_in)
    torch.testing.assert_close(slope[3 * dim :], 3 * (b_in[3 * dim :] > 0).to(dtype), rtol=0, atol=1e-30)


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
def test_the_grid_of_cases_reaches_every_backend() -> None:
    assert {name.partition("/")[0] for name in BACKENDS} == {"cpu", "cuda", "triton"}
