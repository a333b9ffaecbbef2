"""parallel_block on what a model gives it, on every backend that takes CPU tensors: one contract."""

import contextlib
import dataclasses
import importlib.util

import pytest
import torch
import torch.utils.checkpoint
from cpu_isa import CPU_BACKENDS
from error_rule import check
from test_block import HEAD_DIM, HIDDEN, KV_HEADS, RESULTS, SHAPE, make, plain, run, run_with_grads
from torch import Tensor

from kernels import parallel_block, reference, use_backend

TRITON = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
BACKENDS = ["reference", "torch", *["cpu"] * bool(CPU_BACKENDS), "cuda", *["triton"] * TRITON]
COMPOSED = ("reference", "torch")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that takes CPU tensors; `cuda` is the emulator, `triton` its interpreter."""
    if request.param == "cuda":
        request.getfixturevalue("emulator")
    return request.param


def inputs_of(backend: str, seq: int = 5) -> list[Tensor]:
    """The cuda backend multiplies 16 bits only."""
    return make(2, seq, dtype=torch.bfloat16 if backend == "cuda" else torch.float32)


def cache_of(inputs: list[Tensor], *shape: int) -> Tensor:
    return torch.full(shape or (2, 16, KV_HEADS, HEAD_DIM), torch.nan, dtype=inputs[0].dtype)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda c: c.double(), r"dtype = torch\.float64, x\.dtype = torch\.\w+: must be equal"),
        (lambda c: c.to("meta"), r"is on meta, x on cpu: move one to the other's device"),
        (lambda c: c[:, :7], r"holds 3 of 7 tokens: 5 more do not fit; make a longer cache"),
        (lambda c: c[:1], r"shape = \(1, 16, 2, 32\): must be \(2 or more, capacity, 2, 32\)"),
        (lambda c: c[:, :, :1], r"shape = \(2, 16, 1, 32\): must be \(2 or more, capacity, 2, 32\)"),
        (lambda c: c[..., :16], r"shape = \(2, 16, 2, 16\): must be \(2 or more, capacity, 2, 32\)"),
        (lambda c: c[0], r"shape = \(16, 2, 32\): must be \(2 or more, capacity, 2, 32\)"),
    ],
)
def test_a_cache_that_does_not_fit(backend, part, wrong, message):
    inputs = inputs_of(backend)
    cache = [cache_of(inputs), cache_of(inputs)]
    cache[part] = wrong(cache[part])
    for grads in (False, True):
        with torch.set_grad_enabled(grads), pytest.raises(ValueError, match=rf"kv_cache\[{part}\].*{message}"):
            run([t.requires_grad_(grads) if t.is_leaf else t for t in inputs], kv_cache=(*cache, 3), backend=backend)
    assert all(bool(c.isnan().all()) for c in cache if not c.is_meta), "nothing is written before the checks"


def test_a_negative_length(backend):
    inputs = inputs_of(backend)
    with pytest.raises(ValueError, match=r"kv_cache\[2\] = -1: must be the number of tokens so far"):
        run(inputs, kv_cache=(cache_of(inputs), cache_of(inputs), -1), backend=backend)


def test_a_cache_records_no_gradient(backend):
    """Whatever requires one; and what autograd saved of the cache is known to have been overwritten."""
    inputs = inputs_of(backend)
    cache = [cache_of(inputs), cache_of(inputs)]
    versions = [c._version for c in cache]
    with torch.no_grad():
        expected = run(inputs, kv_cache=(*(c.clone() for c in cache), 0), backend=backend)
    y = run([t.clone().requires_grad_() for t in inputs[:7]] + inputs[7:], kv_cache=(*cache, 0), backend=backend)
    assert torch.equal(y, expected) and not y.requires_grad
    assert not any(c.requires_grad for c in cache)
    assert all(c._version > before for c, before in zip(cache, versions, strict=True))


def test_a_longer_cache_of_more_rows_with_strides(backend):
    """A batch's first rows, every other head of a wider cache."""
    inputs = inputs_of(backend)
    wide = [cache_of(inputs, 3, 20, 2 * KV_HEADS, HEAD_DIM)[:, :, ::2] for _ in range(2)]
    dense = [cache_of(inputs) for _ in range(2)]
    first, second = ([inputs[0][:, a:b], *inputs[1:]] for a, b in ((0, 3), (3, 5)))
    for cache in (wide, dense):
        a = run(first, kv_cache=(*cache, 0), backend=backend)
        b = run(second, kv_cache=(*cache, 3), positions=torch.arange(3, 5), backend=backend)
        joined = torch.cat([a, b], 1)
        torch.testing.assert_close(joined, run(inputs, backend=backend), rtol=0.02, atol=0.02)
    assert all(torch.equal(w[:2, :5], d[:, :5]) for w, d in zip(wide, dense, strict=True))
    assert all(bool(w[2].isnan().all()) and bool(w[:, 5:].isnan().all()) for w in wide)


def test_a_packed_cache_equals_the_whole_sequences(backend):
    """Rows that go on at their own pace, every other head of a wider cache."""
    inputs = inputs_of(backend)
    cache = [cache_of(inputs, 2, 9, 2 * KV_HEADS, HEAD_DIM)[:, :, ::2] for _ in range(2)]
    seen, got = torch.zeros(2, dtype=torch.int32), [[], []]
    for new in ((4, 1), (0, 3), (1, 1)):
        parts = [inputs[0][row, seen[row] : seen[row] + n] for row, n in enumerate(new)]
        positions = torch.cat([torch.arange(seen[row], seen[row] + n) for row, n in enumerate(new)])[None]
        options = {"positions": positions, "cu_seqlens": torch.tensor([0, new[0], sum(new)], dtype=torch.int32)}
        y = run([torch.cat(parts)[None], *inputs[1:]], kv_cache=(*cache, seen), backend=backend, **options)
        for row, part in enumerate(y[0].split(list(new))):
            got[row].append(part)
        seen += torch.tensor(new)
    whole = torch.stack([torch.cat(parts) for parts in got])
    torch.testing.assert_close(whole, run(inputs, backend=backend), rtol=0.02, atol=0.02)
    assert all(bool(c[:, 5:].isnan().all()) for c in cache)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_another_default_device(backend, device):
    inputs = inputs_of(backend)
    dropout = {} if backend == "torch" else {"attention_dropout": 0.2}
    options = {**dropout, "residual_dropout": 0.1, "dropout_seed": 3, "backend": backend}
    caches = [[torch.zeros(2, 16, KV_HEADS, HEAD_DIM, dtype=inputs[0].dtype) for _ in range(2)] for _ in range(2)]
    expected = run(inputs, **options), run(inputs, kv_cache=(*caches[0], 0), backend=backend)
    leaves = [t.clone().requires_grad_() for t in inputs[:7]]
    with torch.device(device):
        y = run([*leaves, *inputs[7:]], **options)
        y.backward(y.detach())
        cached = run(inputs, kv_cache=(*caches[1], 0), backend=backend)
    assert torch.equal(y, expected[0]) and torch.equal(cached, expected[1])
    assert all(x.grad is not None and x.grad.device.type == "cpu" for x in leaves)


def test_a_cache_compiles_to_one_graph(backend):
    if backend == "triton":
        pytest.skip("needs a GPU: torch.compile does not compile Triton's interpreter")
    inputs = inputs_of(backend)
    caches = [[torch.zeros(2, 16, KV_HEADS, HEAD_DIM, dtype=inputs[0].dtype) for _ in range(2)] for _ in range(2)]

    def step(length: int, keys: Tensor, values: Tensor, *t: Tensor) -> Tensor:
        return parallel_block(*t, SHAPE, kv_cache=(keys, values, length), backend=backend)

    fast = compiled(step)
    with torch.no_grad():
        for length in (0, 5, 6):
            expected = step(length, *caches[0], *inputs)
            torch.testing.assert_close(fast(length, *caches[1], *inputs), expected, rtol=0.02, atol=0.02)
    assert all(map(torch.equal, *caches)) or inputs[0].dtype == torch.bfloat16


def test_a_second_derivative_is_right_or_an_error(backend):
    inputs = inputs_of(backend)
    leaves = [t.clone().requires_grad_() for t in inputs[:7]]
    y = run([*leaves, *inputs[7:]], backend=backend)
    grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    if backend == "reference":  # right, in float64: the next test
        seconds = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        assert all(x.isfinite().all() and x.any() for x in seconds)
        return
    error, message = NotImplementedError, "parallel_block: a second derivative was asked for"
    if backend == "torch":
        error, message = RuntimeError, r"derivative for aten::_scaled_dot_product\w+ is not implemented"
    with pytest.raises(error, match=message):
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


@pytest.mark.parametrize("name", COMPOSED)
def test_twice_differentiable_or_refused(name):
    inputs = make(1, 3)
    inputs = [t.double() for t in inputs[:7]] + inputs[7:]
    x = inputs[0].requires_grad_()
    # PyTorch's attention on a CPU has no second derivative, and says so.
    refused = pytest.raises(RuntimeError, match=r"derivative for aten::_scaled_dot_product\w+ is not implemented")
    with refused if name == "torch" else contextlib.nullcontext():
        assert torch.autograd.gradgradcheck(lambda x: run([x, *inputs[1:]], backend=name), x, fast_mode=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend, reentrant):
    inputs = inputs_of(backend)
    options = {} if backend == "torch" else {"attention_dropout": 0.2, "residual_dropout": 0.1, "dropout_seed": 3}
    expected = run_with_grads(inputs, backend=backend, **options)
    leaves = [t.clone().requires_grad_() for t in inputs[:7]]
    y = torch.utils.checkpoint.checkpoint(
        lambda *t: run([*t, *inputs[7:]], backend=backend, **options), *leaves, use_reentrant=reentrant
    )
    grad = torch.randn(y.transpose(0, 2).shape, generator=torch.Generator().manual_seed(1)).transpose(0, 2)
    y.backward(grad.to(y.dtype))
    assert all(map(torch.equal, [y.detach(), *(x.grad for x in leaves)], expected))


def test_functional_gradients(backend):
    inputs = inputs_of(backend)
    loss = lambda x: run([x, *inputs[1:]], backend=backend).float().square().sum()
    x = inputs[0].clone().requires_grad_()
    expected = torch.autograd.grad(loss(x), x)[0]
    assert torch.equal(torch.func.grad(loss)(inputs[0]), expected)
    if backend not in COMPOSED:
        with pytest.raises(RuntimeError, match="vmap over FusedBlock"):
            torch.func.vmap(lambda x: run([x, *inputs[1:]], backend=backend))(torch.stack([inputs[0]] * 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, mode):
    inputs = inputs_of(backend)
    expected = run_with_grads(inputs, backend=backend)[0]
    with mode():
        y = run(inputs, backend=backend)
    assert not y.requires_grad and torch.equal(y.clone(), expected)


def test_use_backend_is_the_forward_passes(backend):
    inputs = inputs_of(backend)
    expected = run_with_grads(inputs, backend=backend)
    leaves = [t.clone().requires_grad_() for t in inputs[:7]]
    with use_backend(backend):
        y = run([*leaves, *inputs[7:]])
    grad = torch.randn(y.transpose(0, 2).shape, generator=torch.Generator().manual_seed(1)).transpose(0, 2)
    with use_backend("torch" if backend == "reference" else "reference"):
        y.backward(grad.to(y.dtype))
    assert all(map(torch.equal, (x.grad for x in leaves), expected[1:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "kv_heads = 2: must divide heads = 3"),
        ({"head_dim": 0}, "heads = 4, kv_heads = 2, head_dim = 0: must be at least 1"),
        ({"kv_heads": 0}, "heads = 4, kv_heads = 0, head_dim = 32: must be at least 1"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "cu_seqlens_q.dtype = torch.int64: must be int32"),
    ],
)
def test_options_that_do_not_fit(backend, changes, message):
    with pytest.raises(ValueError, match=message):
        run(inputs_of(backend), **changes, backend=backend)


@pytest.mark.parametrize(("index", "name"), [(0, "x"), (3, "w_in"), (4, "b_in"), (7, "cos")])
def test_none_for_a_tensor_is_named(backend, index, name):
    inputs = list(inputs_of(backend))
    inputs[index] = None
    with pytest.raises(ValueError, match=f"^{name} = None: must be a tensor"):
        run(inputs, backend=backend)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ((1, 2), "kv_cache: must be a tuple of keys, values and length, not tuple"),
        ([1, 2, 3], "kv_cache: must be a tuple of keys, values and length, not list"),
        ((1, 2, None), r"kv_cache\[2\] = None: must be a whole number"),
        ((1, 2, 2.0), r"kv_cache\[2\] = 2.0: must be a whole number"),
    ],
)
def test_a_cache_that_is_none(backend, cache, message):
    with pytest.raises(ValueError, match=message):
        run(inputs_of(backend), kv_cache=cache, backend=backend)


def test_a_shape_is_what_its_name_says():
    assert SHAPE.values == dataclasses.astuple(SHAPE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SHAPE.heads = 8
    with pytest.raises(ValueError, match=r"shape = \(4, 2, 32\): must be a kernels.BlockShape"):
        parallel_block(*make(), (4, 2, 32))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation(backend, activation):
    inputs = inputs_of(backend)
    doubled = [t.double() for t in inputs[:7]] + inputs[7:]
    truth = run_with_grads(doubled, activation=activation, backend="reference")
    for name, x in zip(RESULTS, plain(doubled, activation), strict=True):
        torch.testing.assert_close(x, truth[RESULTS.index(name)], msg=name)
    found, low = run_with_grads(inputs, activation=activation, backend=backend), plain(inputs, activation)
    for results in zip(RESULTS, found, low, truth, strict=True):
        check(*results, inputs[0].dtype)


@pytest.mark.parametrize("index", [1, 2])
def test_norms_that_do_not_fit(backend, index):
    inputs = inputs_of(backend)
    inputs[index] = torch.ones(3)
    with pytest.raises(ValueError, match=rf"norm_\w+.shape = \(3,\): must be \({HIDDEN},\)"):
        run(inputs, backend=backend)
