"""A dropout seed as a number and as a tensor, on every backend."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from calls import CALLS as SMALL_CALLS
from calls import SHAPE, grad_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from kernels import attention, composed_block, flash_attention, fused_block, machine, parallel_block, reference, seeds

CALLS = [("attention", name) for name in ("reference", "cpu", "triton", "cuda/mma")]
CALLS += [("block", name) for name in ("reference", "torch", "cpu", "cuda/mma")]
"""Triton's block reads the seed as its attention does, and test_triton_block.py compares the residual's mask; the hopper
kernels as those of mma, and a case of attention_cases.py has its seed in memory."""
# In the caller's graph; by the operators; the layer composed of ops.
ROUTES = [("attention", "reference"), ("attention", "cpu"), ("block", "cpu"), ("block", "torch")]
by_route = pytest.mark.parametrize("call", ROUTES, indirect=True, ids="-".join)


@pytest.fixture(params=CALLS, ids="-".join)
def call(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(op, backend), the emulator being there if it is needed."""
    if request.param[1].startswith("cuda"):
        request.getfixturevalue("emulator")
    return request.param


def inputs(op: str, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    if op == "attention":
        return [torch.randn(1, 12, 1, 64, generator=generator).to(device, torch.bfloat16) for _ in range(3)]
    block = next(call for call in SMALL_CALLS if call.name == "parallel_block")
    return [x.to(device) for x in block.tensors(torch.bfloat16).values()]


def forward(op: str, backend: str, tensors: Sequence[Tensor], seed: seeds.Seed) -> Tensor:
    if op == "attention":
        q, k, v = tensors
        out = flash_attention(q, k, v, dropout_p=0.5, dropout_seed=seed, backend=backend)
        assert isinstance(out, Tensor)
        return out
    # PyTorch's attention has no dropout of ours.
    shape = dataclasses.replace(SHAPE, attention_dropout=0.5 * (backend != "torch"), residual_dropout=0.25)
    return parallel_block(*tensors, shape, dropout_seed=seed, backend=backend)  # type: ignore[misc, arg-type]


def leaves_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of a block not the tables, cos and sin."""
    return [x.detach().clone().requires_grad_(i < 7) for i, x in enumerate(tensors)]


def gradients(out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], grad_of(out))]


def run(op: str, backend: str, seed: seeds.Seed) -> list[Tensor]:
    """The output and the gradients."""
    leaves = leaves_of(inputs(op))
    return gradients(forward(op, backend, leaves, seed), leaves)


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_tensor_is_the_number_that_it_was_in_the_forward_pass(
    call: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, without being asked on the host: that would wait for the stream, and is an error in a capture."""
    number, shape = (-5, ()) if call[0] == "block" else (0x5EED_0123_4567, (1, 1))
    expected = run(*call, number)
    on_gpu = call[1] in ("triton", "cuda/mma") or call == ("attention", "reference")
    for name in ("item", "tolist", "__int__", "__index__", "__bool__", "numpy") if on_gpu else ():
        was = getattr(Tensor, name)

        def asked(x: Tensor, *arguments: object, was: Callable[..., object] = was) -> object:
            if x.dtype == torch.int64 and x.numel() == 1:  # no `assert`: what prints x asks again
                raise AssertionError("the value of a seed was asked for")
            return was(x, *arguments)

        monkeypatch.setattr(Tensor, name, asked)
    seed, leaves = torch.full(shape, number), leaves_of(inputs(call[0]))
    out = forward(*call, leaves, seed)
    seed.fill_(4)
    assert same(gradients(out, leaves), expected)
    assert not torch.equal(forward(*call, leaves, seed).detach(), expected[0])


@by_route
def test_a_checkpoint_recomputes_with_the_value_of_the_forward_pass(call: tuple[str, str]) -> None:
    seed, leaves = torch.tensor(3), leaves_of(inputs(call[0]))
    out = checkpoint(lambda *tensors: forward(*call, tensors, seed), *leaves, use_reentrant=False)
    seed.fill_(4)
    assert same(gradients(out, leaves), run(*call, 3))


@pytest.mark.parametrize("call", [("attention", "cpu"), ("block", "torch")], indirect=True, ids="-".join)
def test_one_compiled_graph_draws_anew_for_each_value(call: tuple[str, str]) -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return aot_eager(graph, example)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(lambda *tensors: forward(*call, tensors[:-1], tensors[-1]), fullgraph=True, backend=count)
    seed, leaves = torch.tensor(3), leaves_of(inputs(call[0]))
    for value in (3, 4):
        seed.fill_(value)
        out = compiled(*leaves, seed)
        seed.fill_(5)
        for x, y in zip(gradients(out, leaves), run(*call, value), strict=True):
            torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-6)
    assert len(graphs) == 1


@by_route
def test_fake_tensors(call: tuple[str, str]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = [mode.from_tensor(x) for x in inputs(call[0])]
        assert forward(*call, tensors, mode.from_tensor(torch.tensor(3))).shape == tensors[0].shape


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (torch.tensor(3, dtype=torch.int32), r"dropout_seed.dtype = torch.int32: must be int64; use dropout_seed.long"),
        (torch.tensor(3.0), r"dropout_seed.dtype = torch.float32: must be int64; use dropout_seed.long\(\)"),
        (torch.tensor([3, 4]), r"dropout_seed.shape = \(2,\): must be \(\), one seed for the whole call"),
        (torch.zeros(0, dtype=torch.int64), r"dropout_seed.shape = \(0,\): must be \(\)"),
        (torch.zeros((), dtype=torch.int64, device="meta"), r"dropout_seed is on meta, [qx] on cpu: move one to"),
        (2**64, rf"dropout_seed = {2**64}: must fit 64 bits; use dropout_seed % 2\*\*64"),
        (-(2**63) - 1, rf"dropout_seed = {-(2**63) - 1}: must fit 64 bits"),
    ],
)
@by_route
def test_a_wrong_seed_is_named(call: tuple[str, str], seed: seeds.Seed, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(*call, inputs(call[0]), seed)


@pytest.mark.parametrize("call", [c for c in CALLS if c[0] == "attention"], indirect=True, ids="-".join)
def test_a_number_is_64_bits(call: tuple[str, str]) -> None:
    tensors = inputs("attention")
    for seed in (2**63, 2**64 - 1, -1, -(2**63)):
        out = forward(*call, tensors, seed)
        assert torch.equal(out, forward(*call, tensors, seed % 2**64))
        assert not torch.equal(out, forward(*call, tensors, (seed + 2**33) % 2**64))
        torch.testing.assert_close(out, forward("attention", "reference", tensors, seed), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("call", [c for c in CALLS if c[0] == "attention"], indirect=True, ids="-".join)
def test_a_number_may_be_numpys_and_must_be_whole(call: tuple[str, str]) -> None:
    tensors = inputs("attention")
    for seed in (np.uint64(2**63 + 5), np.int32(7)):
        assert torch.equal(forward(*call, tensors, seed), forward(*call, tensors, int(seed)))
    for seed in (1.5, None, "1"):
        with pytest.raises(ValueError, match=f"^dropout_seed = {seed!r}: must be a whole number, or an int64 tensor"):
            forward(*call, tensors, seed)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- captured graphs


class OnGpu:
    """On a CPU the stream that captures is pretended."""

    is_cuda, device = True, "cuda:0"


def test_a_number_in_a_captured_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay would draw the same mask."""
    for capturing, p, seed in ((False, 0.5, 3), (True, 0.0, 3), (True, 0.5, torch.tensor(3))):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        seeds.check_not_captured(p, seed, OnGpu())  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        ValueError, match=r"dropout_p = 0.5 with dropout_seed = 3 while a CUDA graph is captured: every"
    ):
        seeds.check_not_captured(0.5, 3, OnGpu())  # type: ignore[arg-type]


def test_calls_and_operators_look_whether_they_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled meets the stream in the operators only."""
    seen = set()
    for module in (seeds, attention, composed_block, fused_block):
        monkeypatch.setattr(module, "check_not_captured", lambda p, *_, name=module.__name__: seen.add((name, p)))
    forward("attention", "reference", inputs("attention"), 3)
    assert seen == {("kernels.seeds", 0.5)}
    with torch.no_grad():
        q, k, v = inputs("attention")
        torch.ops.phi1.attention_forward(q, k, v, None, None, None, True, 1.0, 0.125, 0, "cpu")
        torch.ops.phi1.attention_forward_out(q, k, v, q.clone(), None, None, None, True, 1.0, 0.25, 0, "cpu")
    assert {("kernels.attention", 0.125), ("kernels.attention", 0.25)} < seen
    forward("block", "cpu", inputs("block"), 3)
    assert ("kernels.fused_block", 0.5) in seen
    forward("block", "torch", inputs("block"), 3)
    assert ("kernels.composed_block", 0.25) in seen


@pytest.mark.skipif("cuda" in machine.cpu().missing, reason="needs a GPU and a build with CUDA kernels")
@pytest.mark.parametrize(("op", "backend"), [c for c in CALLS if c[1].startswith(("cuda", "triton"))], ids="-".join)
def test_a_captured_graph_draws_anew(op: str, backend: str) -> None:
    leaves = leaves_of(inputs(op, "cuda"))
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def step(value: seeds.Seed) -> list[Tensor]:
        return gradients(forward(op, backend, leaves, value), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(seed)  # compiles, and chooses tiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(seed)
    for value in (3, 4):
        seed.fill_(value)
        graph.replay()
        assert same(results, step(value))


def test_masks_of_the_reference_are_the_same_for_a_tensor() -> None:
    at = torch.arange(64)
    for number in (0, 7, -5, 0x123456789ABCDEF):
        seed = torch.tensor(number)
        a, b = (reference.attention_keep(s, torch.tensor(3), at[:, None], at, 0.5) for s in (number % 2**64, seed))
        assert torch.equal(a, b)
        rows = [reference.residual_keep(s, 5, 40, 0.3, torch.device("cpu")) for s in (number % 2**64, seed)]
        assert torch.equal(*rows)
