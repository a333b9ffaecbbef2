"""What every backend of attention, rotary and LayerNorm makes of arguments at the edge: the same value, or the same
error.
"""

import ast
import contextlib
import itertools
import math
import pathlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from calls import CALLS, ROWS, Call
from torch import Tensor

from kernels import (
    apply_rotary,
    checks,
    cuda,
    flash_attention,
    layer_norm,
    reference,
)
from kernels.triton import attention as triton_attention

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
DTYPE = torch.bfloat16
BY_NAME = {call.name: call for call in CALLS}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        request.getfixturevalue("emulator")
    return request.param


def qkv(seq: int = 12, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, seq, 1, 32, generator=generator).to(dtype) for _ in range(3)]


# ------------------------------------------------------------------------------------------------ documents


@pytest.mark.parametrize("starts", [[0, 5], [1, 12], [0, 7, 3, 12], [0, 13], [-1, 12], [12, 0]], ids=str)
def test_documents_that_do_not_cover_the_sequence_are_an_error(backend: str, starts: list[int]) -> None:
    whole, wrong = torch.tensor([0, *[12] * (len(starts) - 1)]).int(), torch.tensor(starts).int()
    for name, cu in (("cu_seqlens_q", (wrong, whole)), ("cu_seqlens_k", (whole, wrong))):
        with pytest.raises(ValueError, match=rf"{name} = \[.*\]: must rise from 0 to the sequence length, 12"):
            flash_attention(*qkv(), cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], backend=backend)


@contextlib.contextmanager
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offsets are as unknown as they are on a GPU."""
    with monkeypatch.context() as patch:
        for module in (reference, cuda, triton_attention):
            patch.setattr(module, "check_offsets", lambda *_: None)
        yield


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", "cuda"], indirect=True)
@pytest.mark.parametrize("starts", [[3, 9], [0, 7, 3, 12], [0, 4, 99], [-5, 4, 4, 12], [9, 2, -1]], ids=str)
def test_where_nobody_looks_they_are_their_running_maximum(
    backend: str, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, that is. Rows of no document: zeros, lse -inf, gradients of zero, whatever was in the memory before."""
    inside = list(itertools.accumulate((min(max(x, 0), 12) for x in starts), max))
    leaves = [x.requires_grad_() for x in qkv()]
    cu = torch.tensor(starts).int()
    with unchecked(monkeypatch):
        result = flash_attention(
            *leaves, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=backend != "torch", backend=backend
        )
        out, lse = result if isinstance(result, tuple) else (result, None)
        found = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    assert out.grad_fn is not None
    parts = (
        [torch.zeros_like(x[:, : inside[0]]) for x in found],
        [],
        [torch.zeros_like(x[:, inside[-1] :]) for x in found],
    )
    expected = [[part] for part in parts[0]]
    for first, end in itertools.pairwise(inside):
        if end > first:
            document = [x.detach()[:, first:end].requires_grad_() for x in leaves]
            y = flash_attention(*document, backend="reference")
            assert isinstance(y, Tensor)
            for i, x in enumerate((y, *torch.autograd.grad(y, document, torch.ones_like(y)))):
                expected[i].append(x)
    for i, (x, last) in enumerate(zip(found, parts[2], strict=True)):
        # Values of order one, two roundings to bfloat16 on either side.
        torch.testing.assert_close(
            x, torch.cat([*expected[i], last], 1), rtol=2**-7, atol=2**-6, msg=lambda m, i=i: f"{i}: {m}"
        )
    if lse is not None:
        covered = torch.zeros(12, dtype=torch.bool)
        covered[inside[0] : inside[-1]] = True
        assert torch.equal(lse[0, 0].isfinite(), covered) and bool((lse[0, 0][~covered] == -math.inf).all())


# ------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("name", ["apply_rotary, positions", "parallel_block, positions"])
@pytest.mark.parametrize("wrong", [-1, ROWS, 2**40])
def test_a_position_outside_the_table_is_an_error(backend: str, name: str, wrong: int) -> None:
    tensors = BY_NAME[name].tensors(DTYPE)
    tensors["positions"][1, 2] = wrong
    with pytest.raises(IndexError, match=rf"positions in .*{wrong}.*: the rotary table has rows 0..{ROWS - 1}"):
        BY_NAME[name].outputs(backend, tensors)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_a_position_outside_the_table_is_an_error_in_a_compiled_graph(backend: str, wrong: int) -> None:
    call = BY_NAME["apply_rotary, positions"]
    tensors = call.tensors(torch.float32)
    tensors["positions"][0, 0] = wrong
    run = torch.compile(lambda t: call.outputs(backend, t), fullgraph=True, backend="aot_eager")
    with pytest.raises((IndexError, RuntimeError), match=f"rotary table.* rows 0..{ROWS - 1}"):
        run(tensors)


def test_many_positions_are_checked_as_few_are() -> None:
    for count in (64, 65):
        positions = torch.arange(count)
        checks.check_positions(positions, count)
        for wrong in (-1, count):
            positions[7] = wrong
            with pytest.raises(IndexError, match=f"rows 0..{count - 1}"):
                checks.check_positions(positions, count)


# ---------------------------------------------------------------------------------------------- out=, scale, seed


@pytest.mark.parametrize("compiled", [False, True])
def test_out_is_seen_to_be_written(backend: str, compiled: bool) -> None:
    """Autograd knows that what it saved is gone."""
    if compiled and backend == "triton":
        pytest.skip("needs a GPU: torch.compile does not compile Triton's interpreter")
    q, k, v = qkv()
    weight, out = torch.ones_like(q, requires_grad=True), torch.ones_like(q)
    y = (weight * out).sum()
    write = lambda q, out: flash_attention(q, k, v, out=out, backend=backend)
    before = out._version
    (torch.compile(write, fullgraph=True, backend="aot_eager") if compiled else write)(q, out)
    assert out._version > before
    torch.testing.assert_close(out, flash_attention(q, k, v, backend=backend), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        write(q, torch.empty_like(q))


def test_out_that_cannot_be_written_is_refused(backend: str) -> None:
    q, k, v = qkv()
    packed = torch.randn(1, 12, 6, 32).to(DTYPE)
    for out, message in (
        (torch.zeros_like(q).requires_grad_(), "out requires grad, and is to be overwritten: give out.detach"),
        (
            torch.zeros(1, 1, 1, 32, dtype=DTYPE).expand(q.shape),
            r"out.stride\(\) = \(32, 0, 32, 1\): elements share memory",
        ),
        (q, "out shares memory with q"),
        (v.view(-1).view(v.shape), "out shares memory with v"),
        (None, "out shares memory with k"),
    ):
        a, b, c = q, k, v
        if out is None:
            a, b, c, out = packed[:, :, 1:2], packed[:, :, 2:3], packed[:, :, 4:5], packed[:, :, 2:3]
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            flash_attention(a, b, c, out=out, backend=backend)
    # Interleaved, but apart.
    a, b, c, out = packed[:, :, :1], packed[:, :, 1:2], packed[:, :, 2:3], packed[:, :, 4:5]
    expected = flash_attention(a.clone(), b.clone(), c.clone(), backend=backend)
    assert torch.equal(flash_attention(a, b, c, out=out, backend=backend), expected) and torch.equal(out, expected)  # type: ignore[arg-type]


def test_shared_memory_is_found_element_by_element() -> None:
    """Against the sets of addresses, of strided views of one buffer."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))
    buffer, seen = torch.zeros(400), {True: 0, False: 0}
    for _ in range(400):
        views = []
        for _ in range(2):
            sizes = [draw(1, 4) for _ in range(3)]
            strides = [draw(0, 20) for _ in range(3)]
            views.append(buffer.as_strided(sizes, strides, draw(0, 60)))
        places = []
        for view in views:
            index = itertools.product(*(range(n) for n in view.shape))
            places.append(
                [view.storage_offset() + sum(i * s for i, s in zip(at, view.stride(), strict=True)) for at in index]
            )
        shared = bool(set(places[0]) & set(places[1]))
        seen[shared] += 1
        assert checks.share_memory(*views) == shared, [(v.shape, v.stride(), v.storage_offset()) for v in views]
        if len(set(places[0])) < len(places[0]):
            assert checks.overlaps_itself(views[0])
    assert min(seen.values()) > 50, seen
    for dense in (buffer.view(4, 10, 10).transpose(0, 2), buffer.view(20, 20)[3:9, 4:7], buffer[::3]):
        assert not checks.overlaps_itself(dense)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.3, -1e-30])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 5), (7, 5), (3, 5)])
def test_a_scale_that_is_not_positive(backend: str, causal: bool, scale: float, seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = qkv()
    q, k, v = q[:, :seqlen_q], k[:, :seqlen_k], v[:, :seqlen_k]
    results = []
    for name in (backend, "reference"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_attention(*leaves, causal=causal, scale=scale, backend=name)
        assert isinstance(out, Tensor)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


def test_scaled_dot_product_attention_is_handed_positive_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another one and is_causal, PyTorch's CPU kernel gives NaN (2.13)."""
    given: list[float] = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: given.append(o["scale"]) or sdpa(*a, **o))
    for scale in (None, 0.4, 0.0, -0.4):
        flash_attention(*qkv(), scale=scale, backend="torch")
    assert given == [32**-0.5, 0.4, 2.0**-64, 0.4]


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_a_scale_that_is_no_number_is_an_error(backend: str, scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale = {scale}: must be finite"):
        flash_attention(*qkv(), scale=scale, backend=backend)


# ------------------------------------------------------------------------------------- nothing, and what is missing


@pytest.mark.parametrize("missing", ["q", "k", "v", "cos", "sin", "weight", "bias", "x"])
def test_none_for_a_tensor_is_named(backend: str, missing: str) -> None:
    for name in ("apply_rotary", "flash_attention", "layer_norm"):
        tensors = BY_NAME[name].tensors(DTYPE)
        if missing in tensors:
            with pytest.raises(ValueError, match=rf"^{missing} = None: must be a tensor"):
                BY_NAME[name].outputs(backend, {**tensors, missing: None})  # type: ignore[dict-item]


def test_a_view_whose_numbers_count_negative_is_what_it_equals(backend: str) -> None:
    """PyTorch marks it; its memory holds the opposite."""
    for name in ("apply_rotary", "flash_attention", "layer_norm"):
        tensors = BY_NAME[name].tensors(DTYPE)
        first = next(iter(tensors))
        with torch.no_grad():
            expected = BY_NAME[name].outputs(backend, tensors)
            found = BY_NAME[name].outputs(backend, {**tensors, first: torch._neg_view(-tensors[first])})
        assert all(map(torch.equal, found, expected)), name


def test_empty_tensors_give_empty_ones_or_an_error_that_says_why(backend: str) -> None:
    zeros = lambda *shape: torch.zeros(shape, dtype=DTYPE)
    table = reference.rotary_table(4, 16)
    x = zeros(0, 4, 2, 32)
    assert flash_attention(x, x, x, backend=backend).shape == x.shape  # type: ignore[union-attr]
    assert [y.shape for y in apply_rotary(x, x, *table, backend=backend)] == [x.shape] * 2
    assert layer_norm(zeros(0, 8), zeros(8), zeros(8), backend=backend).shape == (0, 8)
    empty = zeros(1, 4, 2, 0)
    with pytest.raises(ValueError, match=r"q.shape = \(1, 4, 2, 0\): heads and head_dim must be at least 1"):
        flash_attention(empty, empty, empty, backend=backend)
    with pytest.raises(ValueError, match=r"q.shape = \(1, 4, 2, 0\): head_dim must be at least 1"):
        apply_rotary(empty, empty, *table, backend=backend)
    with pytest.raises(ValueError, match=r"cos.shape = \(4, 0\): rotary_dim = 0 must be in 2..32, head_dim"):
        apply_rotary(zeros(1, 4, 2, 32), zeros(1, 4, 2, 32), *(t[:, :0] for t in table), backend=backend)
    with pytest.raises(ValueError, match=r"x.shape = \(3, 0\): must be \(..., hidden\), hidden at least 1"):
        layer_norm(zeros(3, 0), zeros(0), zeros(0), backend=backend)


@pytest.mark.parametrize("name", ["apply_rotary", "flash_attention", "flash_attention, documents", "layer_norm"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_tensor_given_twice_compiles(backend: str, name: str) -> None:
    x = torch.randn(32) if name == "layer_norm" else torch.randn(1, 12, 1, 32)

    tensors = BY_NAME[name].tensors(torch.float32)

    def run(x: Tensor) -> Tensor:
        given = {n: x if n in BY_NAME[name].differentiable else t for n, t in tensors.items()}
        return sum(y.square().sum() for y in BY_NAME[name].outputs(backend, given))  # type: ignore[return-value]

    grads = []
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    if backend == "torch" and "documents" in name:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="documents are cut at places"):
            compiled(x)
        return
    for function in (run, compiled):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(leaf), leaf)[0])
    torch.testing.assert_close(*grads)


# ------------------------------------------------------------------------------------------ device and dtype


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "torch.device": lambda: torch.device("meta"),
    "set_default_device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_defaults_of_pytorch_change_nothing(backend: str, call: Call, around: str) -> None:
    results = []
    for context in (contextlib.nullcontext, AROUND[around]):
        tensors = call.tensors(DTYPE)
        with context():
            results.append(call.outputs_and_grads(backend, tensors))
    for expected, found in zip(*results, strict=True):
        assert found.device == expected.device and found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
)
TYPED = ("empty", "empty_strided", "full", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros")
"""Of which no argument tells the dtype."""


def test_every_tensor_that_kernels_make_has_its_device_and_dtype_named() -> None:
    """torch.empty(n) goes where `torch.set_default_device` says: into a native kernel as a null pointer."""
    found, package = 0, pathlib.Path(checks.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES
            ):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
                continue
            found += 1
            named = {keyword.arg for keyword in node.keywords}
            wanted = {"device", "dtype"} if node.func.attr in TYPED else {"device"}
            assert wanted <= named, f"{path.name}:{node.lineno}: torch.{node.func.attr} without {wanted - named}"
    assert found > 15
