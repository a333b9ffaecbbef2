"""csrc/cpu's block: what tests/kernels/test_block.py cannot ask of every backend."""

import dataclasses
import itertools

import pytest
import test_block
import torch
from cpu_isa import CPU_BACKENDS, ISAS, use_threads
from error_rule import check
from test_block import DROPOUT, HIDDEN, KV_HEADS, RESULTS, SHAPE, make, plain, run, run_with_grads, shaped
from torch import Tensor

from kernels import BackendError, native, parallel_block, reference

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths_that_fill_no_vector(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_block, "HIDDEN", 37)
    monkeypatch.setattr(test_block, "INNER", 51)
    monkeypatch.setattr(test_block, "ROTARY", 6)
    inputs = make(dtype=dtype)
    truth, low = plain([t.double() for t in inputs]), plain(inputs)
    found = run_with_grads(inputs, backend=name)
    for what, a, b, c in zip(RESULTS, found, low, truth, strict=True):
        check(what, a, b, c, dtype)


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_dropout_and_documents_equal_the_reference(name: str) -> None:
    """Both masks, for tokens of a batch and for packed documents with positions of their own."""
    inputs = make(batch=2, seq=70)
    ends = [0, 3, 64, 90, 140]
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ends)]).view(2, 70)
    packed = {"positions": positions, "cu_seqlens": torch.tensor(ends, dtype=torch.int32)}
    for options in ({}, packed):
        expected = run_with_grads(inputs, **DROPOUT, **options, dropout_seed=-5, backend="reference")
        found = run_with_grads(inputs, **DROPOUT, **options, dropout_seed=-5, backend=name)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_bitwise_equal_for_any_thread_count(isa: str) -> None:
    """The kernels; one thread for oneDNN's products, which promise nothing of the kind."""
    inputs = make(batch=3, seq=70, dtype=torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        results = []
        for threads in (1, 2, 3, 8):
            with use_threads(threads):
                results.append(run_with_grads(inputs, **DROPOUT, dropout_seed=3, backend=f"cpu/{isa}"))
    for name, *values in zip(RESULTS, *results, strict=True):
        assert all(torch.equal(values[0], other) for other in values[1:]), name


@pytest.mark.parametrize("steps", [[11], [1] * 11, [4, 1, 6]], ids=str)
def test_cache_equals_the_whole_sequence(steps: list[int]) -> None:
    inputs = make()
    whole = run(inputs, backend="cpu")
    cache = [torch.full((2, 16, KV_HEADS, SHAPE.head_dim), float("nan")) for _ in range(2)]
    parts, at = [], 0
    for step in steps:
        part = [inputs[0][:, at : at + step], *inputs[1:]]
        parts.append(run(part, positions=torch.arange(at, at + step), kv_cache=(*cache, at), backend="cpu"))
        at += step
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=2e-5, atol=2e-5)
    assert all(bool(c[:, at:].isnan().all()) for c in cache), "nothing is written beyond this call's tokens"


def _saved_bytes(inputs: list[Tensor], backend: str) -> int:
    """Bytes that the graph of one block holds, parameters and the rotary table not counted."""
    leaves = [t.clone().requires_grad_() for t in inputs[:7]]
    known = {t.data_ptr() for t in (*leaves[1:], *inputs[7:])}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run([*leaves, *inputs[7:]], backend=backend)
    assert y.requires_grad
    return sum(saved.values())


def test_saves_x_and_z_and_what_attention_wrote() -> None:
    inputs = make(batch=2, seq=64)
    tokens, width = 2 * 64, test_block.WIDTH + test_block.INNER
    attention = SHAPE.heads * (SHAPE.head_dim + 1)  # its output and the log-sum-exp
    assert _saved_bytes(inputs, "cpu") <= 4 * tokens * (HIDDEN + width + attention)
    assert _saved_bytes(inputs, "reference") > 1.5 * 4 * tokens * (HIDDEN + width + attention)


@pytest.mark.parametrize(
    ("requires_grad", "grad_enabled", "copies"), [(True, True, 1), (True, False, 0), (False, True, 0)]
)
def test_attention_is_copied_only_for_a_backward_pass(requires_grad: bool, grad_enabled: bool, copies: int) -> None:
    inputs = make(batch=2, seq=64)
    leaves = [t.clone().requires_grad_(requires_grad) for t in inputs[:7]]
    with torch.profiler.profile() as profile, torch.set_grad_enabled(grad_enabled):
        run([*leaves, *inputs[7:]], backend="cpu")
    assert sum(event.name == "aten::clone" for event in profile.events()) == copies


@pytest.mark.parametrize("with_grads", [True, False])
def test_opcheck(with_grads: bool) -> None:
    inputs = make(batch=2, seq=9)
    x, parameters = inputs[0].view(18, HIDDEN), inputs[1:7]
    cu = torch.tensor([0, 4, 18], dtype=torch.int32)
    options = (
        *inputs[7:],
        torch.arange(18).view(2, 9),
        cu,
        None,
        9,
        *dataclasses.replace(SHAPE, **DROPOUT).values,
        7,
        "cpu",
    )
    utilities = ("test_schema", "test_faketensor")  # autograd is FusedBlock's, above the ops
    torch.library.opcheck(
        torch.ops.phi1.parallel_block_forward.default, (x, *parameters, with_grads, *options), test_utils=utilities
    )
    y, *saved = torch.ops.phi1.parallel_block_forward(x, *parameters, True, *options)
    arguments = (torch.randn_like(y), x, *saved, *parameters[:5], *options)
    torch.library.opcheck(torch.ops.phi1.parallel_block_backward.default, arguments, test_utils=utilities)


def test_compiles_to_one_graph() -> None:
    inputs = make()
    options = {**DROPOUT, "dropout_seed": 3, "backend": "cpu"}
    eager = run_with_grads(inputs, **options)
    call = shaped(options)
    function = torch.compile(lambda *a: parallel_block(*a, **call) * 1, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in inputs[:7]]
    y = function(*leaves, *inputs[7:])
    grad = torch.randn(y.transpose(0, 2).shape, generator=torch.Generator().manual_seed(1)).transpose(0, 2)
    for a, b in zip([y.detach(), *torch.autograd.grad(y, leaves, grad)], eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_is_the_automatic_choice_and_refuses_what_attention_refuses() -> None:
    inputs = make()
    assert torch.equal(run(inputs), run(inputs, backend="cpu"))
    doubled = [t.double() for t in inputs[:7]] + inputs[7:]
    with pytest.raises(BackendError, match=r"dtype = torch\.float64"):
        run(doubled, backend="cpu")
    torch.testing.assert_close(run(doubled), run(doubled, backend="reference"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"positions": torch.full((11,), 70)}, IndexError, r"positions in \[70, 70\]: the rotary table has rows 0..69"),
        (
            {"positions": torch.zeros(3).long()},
            ValueError,
            r"positions = torch.int64 \(3,\): must be int64 of shape \(11,\)",
        ),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, ValueError, r"= \[0, 9\]: must rise from 0 to .* 22"),
        ({"cu_seqlens": torch.tensor([0, 22])}, ValueError, "cu_seqlens_q.dtype = torch.int64: must be int32"),
        ({"heads": 3, "kv_heads": 2}, ValueError, "kv_heads = 2: must divide heads = 3"),
    ],
)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(make(), backend="cpu", **changes)


def test_a_table_that_is_too_short_or_norms_that_do_not_fit() -> None:
    inputs = make()
    short = [*inputs[:7], *reference.rotary_table(5, 16)]
    with pytest.raises(ValueError, match=r"cos.shape = \(5, 8\): 11 tokens need 11 rows"):
        run(short, backend="cpu")
    inputs[1] = torch.ones(3)
    with pytest.raises(ValueError, match=r"norm_weight.shape = \(3,\): must be \(48,\)"):
        run(inputs, backend="cpu")
