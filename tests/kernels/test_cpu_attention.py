"""csrc/cpu's attention: every instruction set of this CPU against the reference, the same bits for any thread count."""

import math

import pytest
import torch
from attention_cases import CASES, SEED, Case, check_case, make_inputs, run_case
from cpu_isa import ISAS, kernels_of, use_threads

from kernels import BackendError, cpu, flash_attention, native, reference, use_backend

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


EXP2_FORMS = {"full": 0, "rounded": 1, "beside_tiles": 2}  # csrc/cpu/kernels.h, Exp2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_reference(case: Case, dtype: torch.dtype, isa: str) -> None:
    check_case(case, dtype, f"cpu/{isa}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["gqa", "dropout", "documents_unequal", "documents_cache", "decode_four_32", "few"])
def test_bitwise_equal_for_any_thread_count(name: str, isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for threads in (1, 2, 3, 8):
            with use_threads(threads):
                results += [run_case(_case(name), dtype, f"cpu/{isa}") for _ in range(2)]
        for output, first in results[0].items():
            assert all(torch.equal(first, other[output]) for other in results[1:]), (output, dtype)


@pytest.mark.parametrize("form", EXP2_FORMS)
@pytest.mark.parametrize("isa", ISAS)
def test_exp2_error_bound(isa: str, form: str) -> None:
    """csrc/cpu/vector.h states 2^-22, where attention rounds to bf16 2^-18, from -126 up to 127, then 0, and that NaN
    stays.
    """
    bound = 2**-22 if form == "full" or "bf16" not in isa else 2**-18
    x = torch.cat([torch.linspace(-126, 127, 1_000_003), torch.linspace(-2, 2, 1_000_003), torch.arange(-126.0, 128.0)])
    y = torch.empty_like(x)
    kernels_of(isa).exp2(x, y, x.numel(), EXP2_FORMS[form])
    error = float((y.double() / torch.exp2(x.double()) - 1).abs().max())
    assert bound / 8 < error < bound
    whole = x == x.round()
    assert torch.equal(y[whole].double(), torch.exp2(x[whole].double()))  # powers of two are exact
    x = torch.tensor([-127.0, -1e4, math.nan, -126.7, -1e30, -math.inf])
    y = torch.empty_like(x)
    kernels_of(isa).exp2(x, y, x.numel(), EXP2_FORMS[form])
    assert y[[0, 1, 4]].tolist() == [0.0, 0.0, 0.0]
    assert math.isnan(y[2])
    assert 0.0 <= float(y[3]) < 2**-126
    # Beside tiles a -inf is allowed to be NaN: the block is then done again, without.
    assert float(y[5]) == 0.0 or (form == "beside_tiles" and isa == "amx_bf16")


@pytest.mark.parametrize("isa", ISAS)
def test_nan_reaches_its_query_and_no_other(isa: str) -> None:
    q, k, v, _, options = make_inputs(_case("packed"), torch.bfloat16)
    q[1, 17, 2, 5] = math.nan
    out, lse = flash_attention(q, k, v, **options, return_lse=True, backend=f"cpu/{isa}")
    bad = torch.zeros_like(lse, dtype=torch.bool)
    bad[1, 2, 17] = True
    assert torch.equal(lse.isnan(), bad)
    assert torch.equal(out.isnan().any(-1).transpose(1, 2), bad)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_turns_the_order_of_scores_round(scale: float, isa: str) -> None:
    """The forward pass finds the greatest score before it is scaled."""
    q, k, v, _, options = make_inputs(_case("packed"), torch.float32)
    options["scale"] = scale
    expected = flash_attention(q, k, v, **options, return_lse=True, backend="reference")
    found = flash_attention(q, k, v, **options, return_lse=True, backend=f"cpu/{isa}")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_residual_mask_is_the_reference(isa: str) -> None:
    for rows, columns, p in ((1, 1, 0.5), (7, 131, 0.1), (33, 512, 0.25)):
        expected = reference.residual_keep(SEED, rows, columns, p, torch.device("cpu"))
        assert torch.equal(cpu.residual_keep(SEED, rows, columns, p, kernels_of(isa)), expected)


def test_is_the_automatic_choice_and_equals_itself_out_of_place() -> None:
    q, k, v, _, options = make_inputs(_case("dropout"), torch.bfloat16)
    expected = flash_attention(q, k, v, **options, backend="cpu")
    assert torch.equal(flash_attention(q, k, v, **options), expected)
    wide = torch.zeros(*q.shape[:2], 2, *q.shape[2:], dtype=q.dtype)
    flash_attention(q, k, v, **options, out=wide[:, :, 1])
    assert torch.equal(wide[:, :, 1], expected)
    assert not wide[:, :, 0].any()


@pytest.mark.parametrize("name", ["packed", "dropout", "documents"])
def test_opcheck(name: str) -> None:
    q, k, v, grad_out, options = make_inputs(_case(name), torch.float32)
    cu = (options.get("cu_seqlens_q"), options.get("cu_seqlens_k"))
    arguments = (*cu, None, options["causal"], 0.125, options["dropout_p"], options["dropout_seed"], "cpu")
    utilities = ("test_schema", "test_faketensor")  # autograd is kernels.attention's, above the ops
    torch.library.opcheck(torch.ops.phi1.attention_forward.default, (q, k, v, *arguments), test_utils=utilities)
    out, lse = torch.ops.phi1.attention_forward(q, k, v, *arguments)
    backward = torch.ops.phi1.attention_backward.default
    torch.library.opcheck(backward, (grad_out, q, k, v, out, lse, *arguments), test_utils=utilities)


def test_compiles_into_one_graph() -> None:
    q, k, v, grad_out, options = make_inputs(_case("dropout_gqa_32"), torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = flash_attention(q * 1, k, v, **options, backend="cpu")
        assert isinstance(out, torch.Tensor)
        return out * 2

    expected = step(q, k, v)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad_out)
    torch._dynamo.reset()
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(out, expected)
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), grad_out), expected_grads, strict=True):
        assert torch.equal(ours, theirs)


def test_grad_out_of_any_layout() -> None:
    """Expanded and transposed gradients, which a sum or a transpose in the caller produces."""
    q, k, v, grad_out, options = make_inputs(_case("gqa"), torch.float32)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = flash_attention(q, k, v, **options, backend="cpu")
    assert isinstance(out, torch.Tensor)
    for layout in (
        torch.ones((), dtype=out.dtype).expand(out.shape),
        grad_out.transpose(1, 3).contiguous().transpose(1, 3),
        grad_out[:, :1].expand(out.shape),
    ):
        ours = torch.autograd.grad(out, (q, k, v), layout, retain_graph=True)
        plain = torch.autograd.grad(out, (q, k, v), layout.contiguous(), retain_graph=True)
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ bad input


def _call(**changes: object) -> None:
    arguments: dict[str, object] = {name: torch.zeros(1, 8, 2, 64) for name in ("q", "k", "v")}
    flash_attention(**(arguments | {"backend": "cpu"} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(1, 8, 3, 64), "v": torch.zeros(1, 8, 3, 64)}, r"k.shape\[2\] = 3 .* must divide q's 2"),
        ({"v": torch.zeros(1, 9, 2, 64)}, r"v.shape = \(1, 9, 2, 64\): must be k.shape"),
        ({"k": torch.zeros(1, 8, 2, 64).bfloat16()}, r"k.dtype = torch.bfloat16.*use k.to"),
        ({"q": torch.zeros(8, 2, 64)}, r"q.shape = \(8, 2, 64\): must be \(batch"),
        ({"dropout_p": 1.0}, r"dropout_p = 1.0: must be in \[0, 1\)"),
        ({"cu_seqlens_q": torch.tensor([0, 8], dtype=torch.int32)}, "give both or neither"),
        (
            {
                name: torch.tensor(ends, dtype=torch.int32)
                for name, ends in (("cu_seqlens_q", [0, 9]), ("cu_seqlens_k", [0, 8]))
            },
            r"cu_seqlens_q = \[0, 9\]: must rise from 0 to the sequence length, 8",
        ),
        (
            {
                name: torch.tensor(ends, dtype=torch.int32)
                for name, ends in (("cu_seqlens_q", [0, 3, 8]), ("cu_seqlens_k", [0, 9, 8]))
            },
            r"cu_seqlens_k = \[0, 9, 8\]: must rise",
        ),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(**changes)


def test_what_it_refuses_goes_elsewhere_or_is_an_error() -> None:
    q = torch.randn(1, 5, 2, 80)
    with pytest.raises(
        BackendError, match=r"head_dim = 80: the kernels are made for 32, 64, 128; pad q, k and v; able: reference"
    ):
        flash_attention(q, q, q, dropout_p=0.1, backend="cpu")
    with use_backend("cpu"), pytest.raises(BackendError, match=r"dtype = torch\.float64"):
        flash_attention(q[..., :64].double(), q[..., :64].double(), q[..., :64].double())
    assert torch.allclose(flash_attention(q, q, q), flash_attention(q, q, q, backend="reference"), atol=1e-5)
