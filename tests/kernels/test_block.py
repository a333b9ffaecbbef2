"""parallel_block against transformers' PhiDecoderLayer, and its backends against each other."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from cpu_isa import CPU_BACKENDS
from error_rule import bound, check, error
from torch import Tensor

from kernels import BackendError, BlockShape, cache_rows, layer_norm, parallel_block, reference

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, ROTARY = 4, 2, 32, 48, 80, 16
SHAPE = BlockShape(HEADS, KV_HEADS, HEAD_DIM)
RESULTS = ("y", "dx", "dnorm_weight", "dnorm_bias", "dw_in", "db_in", "dw_out", "db_out")
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM


def make(batch: int = 2, seq: int = 11, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, cos, sin: every number random."""
    generator = torch.Generator().manual_seed(11)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    return [
        randn(batch, seq, HIDDEN),
        randn(HIDDEN),
        randn(HIDDEN, scale=0.1),
        randn(WIDTH + INNER, HIDDEN, scale=HIDDEN**-0.5),
        randn(WIDTH + INNER, scale=0.1),
        randn(HIDDEN, HEADS * HEAD_DIM + INNER, scale=0.1),
        randn(HIDDEN, scale=0.1),
        *reference.rotary_table(70, ROTARY),
    ]


def shaped(options: dict[str, object]) -> dict[str, object]:
    """Options of `parallel_block`: those that are fields of BlockShape change SHAPE."""
    fields = {field.name for field in dataclasses.fields(BlockShape)}
    changes = {name: value for name, value in options.items() if name in fields}
    rest = {name: value for name, value in options.items() if name not in fields}
    return {"shape": dataclasses.replace(SHAPE, **changes), **rest}


def run(inputs: list[Tensor], **options: object) -> Tensor:
    return parallel_block(*inputs, **shaped(options))


def run_with_grads(inputs: list[Tensor], **options: object) -> list[Tensor]:
    """y and the gradients of x and the six parameters."""
    leaves = [t.clone().requires_grad_() for t in inputs[:7]]
    y = run([*leaves, *inputs[7:]], **options)
    grad = torch.randn(y.transpose(0, 2).shape, generator=torch.Generator().manual_seed(1)).transpose(0, 2)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda u: 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u * u * u))),
    "relu2": lambda u: u.clamp(min=0) * u.clamp(min=0),
}
"""Each step in the inputs' dtype."""


def plain(inputs: list[Tensor], activation: str = "gelu_new") -> list[Tensor]:
    """y and its gradients by the formulas, every intermediate in x's dtype."""
    x, gain, shift, w_in, b_in, w_out, b_out = leaves = [t.clone().requires_grad_() for t in inputs[:7]]
    cos, sin = (t[: x.shape[1], None].to(x.dtype) for t in inputs[7:])
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) * gain + shift
    z = normed @ w_in.T + b_in
    q, k, v, u = z.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, INNER], -1)
    q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)) for t in (q, k, v))
    half = ROTARY // 2

    def turn(t: Tensor) -> Tensor:
        a, b, rest = t[..., :half], t[..., half:ROTARY], t[..., ROTARY:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    q, k, v = (t.repeat_interleave(HEADS // t.shape[2], 2).transpose(1, 2) for t in (turn(q), turn(k), v))
    scores = (q * HEAD_DIM**-0.5) @ k.transpose(-1, -2)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    attention = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v
    y = x + torch.cat([attention.transpose(1, 2).flatten(2), ACTIVATIONS[activation](u)], -1) @ w_out.T + b_out
    grad = torch.randn(y.transpose(0, 2).shape, generator=torch.Generator().manual_seed(1)).transpose(0, 2)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize("name", ["reference", "torch", None])
def test_equals_transformers_decoder_layer(name):
    """With weights shared and dropout off. transformers fuses nothing: q, k, v, dense, fc1, fc2 are its slices."""
    from transformers import PhiConfig
    from transformers.models.phi.modeling_phi import PhiDecoderLayer

    config = PhiConfig(
        hidden_size=128,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        partial_rotary_factor=0.5,
        attention_dropout=0.0,
        resid_pdrop=0.0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    layer = PhiDecoderLayer(config, 0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    attention, mlp = layer.self_attn, layer.mlp
    x = torch.randn(2, 13, 128, dtype=torch.float64)
    cos, sin = reference.rotary_table(13, 16)
    embeddings = tuple(torch.cat([t, t], -1)[None].double() for t in (cos, sin))
    causal = torch.full((13, 13), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    x.requires_grad_()
    theirs = layer(x, attention_mask=causal, position_embeddings=embeddings)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1]
    ours = parallel_block(
        x,
        layer.input_layernorm.weight,
        layer.input_layernorm.bias,
        torch.cat([p.weight for p in projections]),
        torch.cat([p.bias for p in projections]),
        torch.cat([attention.dense.weight, mlp.fc2.weight], dim=1),
        attention.dense.bias + mlp.fc2.bias,
        cos,
        sin,
        BlockShape(heads=4, kv_heads=2, head_dim=32),
        backend=name,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    wanted = [x, layer.input_layernorm.weight, attention.k_proj.weight, mlp.fc1.bias, mlp.fc2.weight]
    grad = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad(y, wanted, grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.fixture(params=["reference", "torch", *CPU_BACKENDS])
def backend(request):
    """A backend's name, with the CPU backend's instruction set in use."""
    yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "seq"), [(2, 11), (1, 1), (1, 69)])
def test_backends_obey_the_error_rule(backend, batch, seq, dtype):
    inputs = make(batch, seq, dtype=dtype)
    truth, low = plain([t.double() for t in inputs]), plain(inputs)
    results = zip(RESULTS, run_with_grads(inputs, backend=backend), low, truth, strict=True)
    for what, found, baseline, expected in results:
        check(what, found, baseline, expected, dtype)


@pytest.mark.parametrize("mutation", ["no_residual", "sequential", "rows_swapped", "columns_swapped"])
def test_the_tolerance_bites(mutation):
    inputs = make(dtype=torch.bfloat16)
    doubled = [t.double() for t in inputs[:7]] + inputs[7:]
    truth, low = run(doubled, backend="reference"), plain(inputs)[0]
    x, w_in, w_out = doubled[0], doubled[3], doubled[5]
    if mutation == "no_residual":
        wrong = truth - x
    elif mutation == "sequential":  # the MLP after attention, not beside it
        only_attention = [*doubled[:5], w_out.clone(), *doubled[6:]]
        only_attention[5][:, HEADS * HEAD_DIM :] = 0
        y = run(only_attention, backend="reference")
        normed = layer_norm(y, doubled[1], doubled[2], backend="reference")
        u = reference.gelu(normed @ w_in[WIDTH:].T + doubled[4][WIDTH:])
        wrong = y + u @ w_out[:, HEADS * HEAD_DIM :].T
    elif mutation == "rows_swapped":  # k and v exchanged
        order = torch.arange(w_in.shape[0])
        k, v = slice(HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM), slice((HEADS + KV_HEADS) * HEAD_DIM, WIDTH)
        order[k], order[v] = order[v].clone(), order[k].clone()
        wrong = run([*doubled[:3], w_in[order], doubled[4][order], *doubled[5:]], backend="reference")
    else:
        wrong = run([*doubled[:5], w_out.roll(INNER, 1), *doubled[6:]], backend="reference")
    assert error(wrong, truth) > 5 * bound(low, truth, torch.bfloat16)


DROPOUT = {"attention_dropout": 0.2, "residual_dropout": 0.3}


def test_dropout_is_a_function_of_the_seed():
    inputs = make()
    first = run_with_grads(inputs, **DROPOUT, dropout_seed=5, backend="reference")
    again = run_with_grads(inputs, **DROPOUT, dropout_seed=5, backend="reference")
    other = run_with_grads(inputs, **DROPOUT, dropout_seed=6, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_dropout_masks_are_equal_in_every_backend():
    """The automatic choice (fused attention where there is one) draws the reference's masks."""
    inputs = make(seq=70)
    auto = run_with_grads(inputs, **DROPOUT, dropout_seed=5)
    for a, b in zip(auto, run_with_grads(inputs, **DROPOUT, dropout_seed=5, backend="reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(BackendError, match=r"dropout_p = 0\.2"):
        run(inputs, **DROPOUT, backend="torch")


@pytest.mark.parametrize("name", ["torch", None])
def test_residual_dropout_drops_the_sum_and_keeps_x(name):
    inputs = make()
    y, plain = run(inputs, residual_dropout=0.3, dropout_seed=9, backend=name), run(inputs, backend=name)
    x = inputs[0]
    keep = reference.residual_keep(9, x.shape[0] * x.shape[1], HIDDEN, 0.3, x.device).view(x.shape)
    torch.testing.assert_close(y[~keep], x[~keep], rtol=0, atol=0)
    scale = reference.dropout_scale(0.3)
    torch.testing.assert_close((y - x)[keep], scale * (plain - x)[keep], rtol=1e-4, atol=1e-5)
    assert 0.2 < float((~keep).double().mean()) < 0.4


@pytest.mark.parametrize("steps", [[11], [1] * 11, [4, 1, 6]], ids=str)
@pytest.mark.parametrize("name", ["reference", "torch", None])
def test_cache_equals_the_whole_sequence(name, steps):
    inputs = [t.double() for t in make()[:7]] + make()[7:]
    whole = run(inputs, backend=name)
    cache = [torch.full((2, 16, KV_HEADS, HEAD_DIM), float("nan"), dtype=torch.float64) for _ in range(2)]
    parts, at = [], 0
    with torch.no_grad():
        for step in steps:
            part = [inputs[0][:, at : at + step], *inputs[1:]]
            positions = torch.arange(at, at + step)
            parts.append(run(part, positions=positions, kv_cache=(*cache, at), backend=name))
            at += step
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    assert all(bool(c[:, at:].isnan().all()) for c in cache), "nothing is written beyond this call's tokens"


@pytest.mark.parametrize("name", ["reference", "torch", None])
def test_packed_cache_equals_the_whole_sequences(name):
    """Three rows that get tokens at their own pace: some none, some many at once."""
    inputs = [t.double() for t in make(batch=3)[:7]] + make()[7:]
    whole = run(inputs, backend=name)
    cache = [torch.full((4, 12, KV_HEADS, HEAD_DIM), float("nan"), dtype=torch.float64) for _ in range(2)]
    seen, got = torch.zeros(3, dtype=torch.int32), [[], [], []]
    for new in ((4, 1, 0), (1, 1, 7), (0, 5, 1), (6, 0, 1), (0, 4, 2)):
        parts = [inputs[0][row, seen[row] : seen[row] + n] for row, n in enumerate(new)]
        positions = torch.cat([torch.arange(seen[row], seen[row] + n) for row, n in enumerate(new)])
        cu = torch.tensor([0, *new]).cumsum(0).int()
        x = torch.cat(parts)[None]
        at = cache_rows(seen, cu, sum(new), 12) if new[0] else seen  # made once for all layers, or in the call
        y = run([x, *inputs[1:]], positions=positions[None], cu_seqlens=cu, kv_cache=(*cache, at), backend=name)
        for row, part in enumerate(y[0].split(list(new))):
            got[row].append(part)
        seen += torch.tensor(new)
    assert seen.tolist() == [11, 11, 11]
    torch.testing.assert_close(torch.stack([torch.cat(parts) for parts in got]), whole, rtol=1e-12, atol=1e-12)
    assert all(bool(c[3].isnan().all() and c[:, 11:].isnan().all()) for c in cache), (
        "nothing is written beyond the rows' tokens"
    )


@pytest.mark.parametrize("name", ["reference", "torch", None])
def test_packed_documents_equal_separate_ones(name):
    inputs = [t.double() for t in make(batch=1, seq=20)[:7]] + make()[7:]
    ends = [0, 3, 4, 15, 20]
    cu = torch.tensor(ends, dtype=torch.int32)
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ends)])
    parts = [run([inputs[0][:, a:b], *inputs[1:]], backend=name) for a, b in itertools.pairwise(ends)]
    packed = run(inputs, positions=positions[None], cu_seqlens=cu, backend=name)
    torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=1e-12, atol=1e-12)
    # the same tokens as a batch of 2 x 10: documents are counted over the folded batch
    folded = run(
        [inputs[0].view(2, 10, HIDDEN), *inputs[1:]], positions=positions.view(2, 10), cu_seqlens=cu, backend=name
    )
    torch.testing.assert_close(folded.view(1, 20, HIDDEN), packed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["reference", None])
def test_compiles_to_one_graph(name):
    inputs = make()
    options = {**DROPOUT, "dropout_seed": 3, "backend": name}
    eager = run_with_grads(inputs, **options)
    call = shaped(options)
    function = torch.compile(lambda *a: parallel_block(*a, **call), fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in inputs[:7]]
    y = function(*leaves, *inputs[7:])
    torch.testing.assert_close(y.detach(), eager[0])
    grad = torch.randn(y.transpose(0, 2).shape, generator=torch.Generator().manual_seed(1)).transpose(0, 2)
    for a, b in zip(torch.autograd.grad(y, leaves, grad), eager[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def _changed(index: int, value: Tensor) -> list[Tensor]:
    inputs = make()
    inputs[index] = value
    return inputs


_CU, _SEEN = torch.tensor([0, 8, 22], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
_CACHE = tuple(torch.zeros(2, 16, KV_HEADS, HEAD_DIM) for _ in range(2))
_TWO = torch.tensor([0, 1, 2], dtype=torch.int32)


def _rows(capacity: int) -> reference.CacheRows:
    """Of one token behind each row's."""
    return cache_rows(_SEEN, _TWO, 2, capacity)


def test_rows_of_a_cache_are_checked() -> None:
    with pytest.raises(
        ValueError, match="the cache holds 3 of 3 tokens in row 1: 1 more do not fit; make a longer cache"
    ):
        cache_rows(_SEEN, _TWO, 2, 3)
    with pytest.raises(ValueError, match=r"kv_cache\[2\].shape = \(2,\): must be \(1,\)"):
        cache_rows(_SEEN, _TWO[:2], 1, 16)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (_changed(0, torch.zeros(11, HIDDEN)), {}, r"x.shape = \(11, 48\): must be \(batch, seq, hidden\)"),
        (_changed(0, torch.zeros(2, 11, HIDDEN).int()), {}, "x.dtype = torch.int32"),
        (
            _changed(3, torch.zeros(WIDTH, HIDDEN)),
            {},
            r"w_in.shape = \(256, 48\): must be \(128 \+ 2 \* 64 \+ inner, 48\)",
        ),
        (_changed(3, torch.zeros(WIDTH + INNER, 3)), {}, r"w_in.shape = \(336, 3\)"),
        (_changed(4, torch.zeros(3)), {}, r"b_in.shape = \(3,\): must be \(336,\)"),
        (_changed(5, torch.zeros(3, 3)), {}, r"w_out.shape = \(3, 3\): must be \(48, 208\)"),
        (_changed(6, torch.zeros(HIDDEN).half()), {}, "b_out.dtype = torch.float16, x.dtype = torch.float32"),
        (make(), {"residual_dropout": 1.0}, r"residual_dropout = 1.0: must be in \[0, 1\)"),
        (make(), {"activation": "gelu"}, "activation = 'gelu': must be one of gelu_new, relu2"),
        (make(), {"attention_dropout": -0.1}, r"attention_dropout = -0.1: must be in \[0, 1\)"),
        (make(), {"kv_cache": (*_CACHE, 10)}, r"kv_cache\[0\] holds 10 of 16 tokens: 11 more do not fit"),
        (make(), {"kv_cache": (*_CACHE, 0), "cu_seqlens": _CU}, r"kv_cache\[2\]: must be a number, or with cu_seqlens"),
        (make(), {"kv_cache": (*_CACHE, _SEEN)}, r"kv_cache\[2\]: must be a number, or with cu_seqlens"),
        (make(), {"kv_cache": (*_CACHE, _SEEN.long()), "cu_seqlens": _CU}, r"kv_cache\[2\].dtype = torch.int64"),
        (
            make(),
            {"kv_cache": (*_CACHE, _SEEN[:1]), "cu_seqlens": _CU},
            r"kv_cache\[2\].shape = \(1,\): must be \(2,\)",
        ),
        (
            make(),
            {"kv_cache": (*_CACHE, _SEEN), "cu_seqlens": _CU},
            r"kv_cache\[0\] holds 3 of 16 tokens in row 1: 14 more do",
        ),
        (
            make(),
            {"kv_cache": (*_CACHE, _rows(16)), "cu_seqlens": _CU},
            r"kv_cache\[2\] is of 2 tokens, x of 22: make another",
        ),
        (
            _changed(0, torch.zeros(1, 2, HIDDEN)),
            {"kv_cache": (*_CACHE, _rows(9)), "cu_seqlens": _TWO},
            r"kv_cache\[0\].shape\[1\] = 16, kv_cache\[2\].capacity = 9: must be equal",
        ),
        (make(), {"kv_cache": (*_CACHE, _rows(16))}, r"kv_cache\[2\]: must be a number, or with cu_seqlens"),
        (make(), {"kv_cache": (*_CACHE, -_SEEN), "cu_seqlens": _CU}, r"kv_cache\[0\] holds -3 of 16 tokens in row 1"),
    ],
)
def test_bad_input(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        run(inputs, **options)
