"""Triton's parallel block, with all forms of its products: on a GPU compiled, elsewhere in Triton's interpreter."""

import dataclasses
import functools
import importlib
import itertools
import sys
from types import ModuleType

import pytest
import test_block
import torch
from error_rule import check
from test_block import DROPOUT, HIDDEN, INNER, KV_HEADS, RESULTS, SHAPE, make, plain, run, shaped
from torch import Tensor
from triton_mutation import mutate

from kernels import BackendError, parallel_block, reference
from kernels.fused_block import Dropout, Layout
from kernels.triton import attention as triton_attention
from kernels.triton import descriptors

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HOPPER = not GPU or torch.cuda.get_device_capability()[0] == 9
# The version that makes the products so, and whether it loads by pointers even where a call may have descriptors.
PRODUCTS = {
    "vendor": ("triton/descriptors" if HOPPER else "triton/pointers", False),
    "pointers": ("triton/product", True),
    "descriptors": ("triton/product", False),
}
_version = "triton"  # of the product that a test chose
# Attention refuses float32 on a GPU.
DTYPES = [torch.bfloat16, torch.float16] if GPU else [torch.bfloat16, torch.float16, torch.float32]


def choose(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version, pointers = PRODUCTS[product]
    monkeypatch.setattr(sys.modules[__name__], "_version", version)
    if pointers:
        monkeypatch.setattr(descriptors, "allowed", lambda *tensors: False)


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    choose(request.param, monkeypatch)
    return request.param


def _attention_backward(*arguments, grads):
    for to, grad in zip(grads, reference.attention_backward(*arguments), strict=True):
        to.copy_(grad)


@pytest.fixture
def reference_attention(monkeypatch):
    """Attention has tests and mutations of its own, and takes more than half of the interpreter's time."""
    forward, backward = reference.attention_forward, _attention_backward
    monkeypatch.setattr(triton_attention, "attention_forward", lambda *a, by_descriptors, **o: forward(*a, **o))
    monkeypatch.setattr(triton_attention, "attention_backward", lambda *a, by_descriptors, **o: backward(*a, **o))


def run_with_grads(inputs: list[Tensor], **options: object) -> list[Tensor]:
    """test_block's, on this device; results on the CPU. The gradient of y is not contiguous."""
    leaves = [t.to(DEVICE).clone().requires_grad_() for t in inputs[:7]]
    y = run([*leaves, *(t.to(DEVICE) for t in inputs[7:])], **{"backend": _version, **options})
    grad = torch.randn(y.transpose(0, 2).shape, generator=torch.Generator().manual_seed(1)).transpose(0, 2)
    return [t.cpu() for t in (y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype).to(DEVICE)))]


def block() -> ModuleType:
    """The backend's module, or the mutant in its place."""
    return importlib.import_module("kernels.triton.block")


def project(side: str, *arguments: object) -> Tensor:
    """`project_in` or `project_out` of the product that the test chose."""
    return getattr(block(), f"project_{side}" + ("_whole" if _version == "triton/product" else ""))(*arguments)


def check_run(found: list[Tensor], inputs: list[Tensor]) -> None:
    truth, low = plain([t.double() for t in inputs]), plain(inputs)
    for what, a, b, c in zip(RESULTS, found, low, truth, strict=True):
        check(what, a, b, c, inputs[0].dtype)


# On a GPU everything; the interpreter takes its time: there each shape with each product, in one dtype each.
RUNS = [
    (product, shape, dtype)
    for i, product in enumerate(PRODUCTS)
    for j, shape in enumerate([(2, 11), (1, 1), (1, 69)])
    for k, dtype in enumerate(DTYPES)
    if GPU or k == (i + j) % 3
]


@pytest.mark.parametrize(("product", "shape", "dtype"), RUNS, ids=str, indirect=["product"])
def test_obeys_the_error_rule(product, shape, dtype):
    inputs = make(*shape, dtype=dtype)
    check_run(run_with_grads(inputs), inputs)


@pytest.mark.parametrize("widths", [(37, 51, 6), (40, 56, 16)], ids=["odd", "aligned"])
def test_widths_that_fill_no_tile(product, widths, monkeypatch):
    """Also a rotary width of 6: three pairs of a head turn, thirteen do not. The aligned may have descriptors."""
    for name, value in zip(("HIDDEN", "INNER", "ROTARY"), widths, strict=True):
        monkeypatch.setattr(test_block, name, value)
    inputs = make(dtype=torch.bfloat16)
    check_run(run_with_grads(inputs), inputs)


def test_dropout_and_documents_equal_the_reference(product):
    """Both masks: for tokens of a batch with one product, for packed documents with positions with the other."""
    documents = product == "descriptors"
    dtype = torch.bfloat16 if GPU else torch.float32
    inputs = make(batch=2, seq=35)
    ends = [0, 3, 30, 50, 70]
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ends)]).view(2, 35)
    options = {"positions": positions, "cu_seqlens": torch.tensor(ends, dtype=torch.int32)} if documents else {}
    options |= {**DROPOUT, "dropout_seed": -5}
    expected = test_block.run_with_grads([t.to(dtype) for t in inputs[:7]] + inputs[7:], **options, backend="reference")
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    found = run_with_grads([t.to(dtype) for t in inputs[:7]] + inputs[7:], **options)
    for a, b in zip(found, expected, strict=True):
        tolerance = 2e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_residual_mask_is_the_reference_bit_for_bit(product):
    """Of zeros, a bias of ones and x = 0 only the mask remains; in the backward pass of a gradient of ones."""
    p, seed, rows, columns = 0.3, 0x5EED_0123_4567, 70, 200
    expected = reference.residual_keep(seed, rows, columns, p, torch.device("cpu"))
    g, w, bias = (torch.zeros(shape, device=DEVICE) for shape in ((rows, 64), (columns, 64), (columns,)))
    x, dropout = torch.zeros(rows, columns, device=DEVICE), Dropout(p, seed)
    y = project("out", g, w, bias + 1, x, dropout).cpu()
    assert torch.equal(y, expected * torch.tensor(reference.dropout_scale(p)))
    for dtype in (torch.float32, torch.bfloat16):  # what the composed block multiplies by
        for value in (seed, torch.tensor(seed, device=DEVICE)):
            factor = block().residual_factor(x.to(dtype).view(2, rows // 2, columns), value, p)
            assert torch.equal(factor.cpu().view_as(y), y.to(dtype))
    grad, grad_bias = block().project_out_backward(x + 1, dropout)
    assert torch.equal(grad.cpu(), y)
    torch.testing.assert_close(grad_bias.cpu(), y.sum(0))
    assert block().project_out_backward(x, Dropout(0.0, seed))[0] is x
    # As in the reference dropout multiplies: what is NaN stays NaN where it is dropped.
    x[:] = float("nan")
    assert bool(block().project_out_backward(x, dropout)[0].isnan().all())
    assert bool(project("out", g + float("nan"), w, bias, torch.zeros_like(x), dropout).isnan().all())


def test_backward_makes_gelu_again_with_the_same_bits(product):
    inputs = make(seq=35, dtype=torch.bfloat16)
    x, w_in, b_in, cos, sin = (inputs[i].to(DEVICE) for i in (0, 3, 4, 7, 8))
    layout = Layout(SHAPE, 2, 35, INNER, cos, sin, None)
    wide = torch.full((70, INNER + 40), float("nan"), dtype=x.dtype, device=DEVICE)
    z = project("in", x.view(70, HIDDEN), w_in, b_in, wide[:, 16 : 16 + INNER], layout)
    forward = wide[:, 16 : 16 + INNER].clone()
    wide[:, 16 : 16 + INNER] = 1
    block().project_in_backward(torch.zeros_like(z), z, b_in, wide[:, 16 : 16 + INNER], layout)
    assert torch.equal(wide[:, 16 : 16 + INNER], forward)
    assert int(wide.isnan().sum()) == 70 * 40, "nothing is written beside the view"


@pytest.mark.usefixtures("reference_attention")
def test_bitwise_reproducible(product):
    inputs = make(batch=2, seq=17, dtype=torch.bfloat16)
    first = run_with_grads(inputs, **DROPOUT, dropout_seed=3)
    for _ in range(50 if GPU else 1):
        again = run_with_grads(inputs, **DROPOUT, dropout_seed=3)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_cache_equals_the_whole_sequence(product):
    dtype = torch.bfloat16 if GPU else torch.float32
    inputs = [t.to(DEVICE) for t in make(dtype=dtype)]
    whole = run(inputs, backend=_version)
    cache = [torch.full((2, 16, KV_HEADS, SHAPE.head_dim), float("nan"), dtype=dtype, device=DEVICE) for _ in "kv"]
    parts, at = [], 0
    for step in (4, 1, 6):
        part = [inputs[0][:, at : at + step], *inputs[1:]]
        positions = torch.arange(at, at + step, device=DEVICE)
        parts.append(run(part, positions=positions, kv_cache=(*cache, at), backend=_version))
        at += step
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=tolerance, atol=tolerance)
    assert all(bool(c[:, at:].isnan().all()) for c in cache), "nothing is written beyond this call's tokens"


BOTH = [
    ("block_elementwise", "a * c - b * s, b * c + a * s", "a * c + b * s, b * c - a * s"),
    (
        "block_elementwise",
        "first + tl.where(angle < HALF, HALF, 1), angle",
        "first + tl.where(angle < HALF, HALF + 1, 1), angle",
    ),
    ("block_elementwise", "tl.where(angle < HALF, angle, 2 * angle)", "tl.where(angle < HALF, angle, 2 * angle + 1)"),
    ("block_elementwise", "row = (token % seq)", "row = (token % seq * 0)"),
    ("block_elementwise", "return first, tl.where(in_u, width,", "return first, tl.where(in_u, width - 1,"),
    ("numeric", "(1.0 + 0.044715 * square) * (-LOG2E", "(1.0 + 0.044715 * y) * (-LOG2E"),
]
ONE = [
    ("vendor", "block_elementwise", "pair_mask) + _load(bias_ptr + b_column, pair_inside)[None, :]", "pair_mask)"),
    (
        "vendor",
        "block_elementwise",
        "x = _load(row + column[None, :], mask) + _load(bias_ptr + column, column < end)[None, :]",
        "x = _load(row + column[None, :], mask)",
    ),
    (
        "vendor",
        "block_elementwise",
        "_load(y_ptr + at, mask) + _load(bias_ptr + column, column < columns)[None, :]",
        "_load(y_ptr + at, mask)",
    ),
    ("vendor", "block_elementwise", "_load(x_ptr + at, mask) + h", "h"),
    ("vendor", "block_elementwise", "pair_mask), c, -s)", "pair_mask), c, s)"),
    ("vendor", "block_elementwise", "_load(activated, mask) * slope", "_load(activated, mask)"),
    ("vendor", "block_elementwise", "activate(_load(z_ptr + at, mask) + bias,", "activate(_load(z_ptr + at, mask),"),
    ("vendor", "block_elementwise", "            b_sum += b\n", "            b_sum = b\n"),
    ("vendor", "block_elementwise", "                total += d\n", "                total = d\n"),
    ("vendor", "numeric", "3 * 0.044715", "0.044715"),
    ("vendor", "norm", "dx += tl.load(residual", "dx -= tl.load(residual"),
    ("pointers", "block_product", "weight_row % 2 == 0", "weight_row % 2 == 1"),
    ("pointers", "block_product", "weight_row = tl.where(first < turned, ", "weight_row = tl.where(first < 0, "),
    ("pointers", "block_product", "k < summed - start", "k < summed"),
    ("pointers", "block_product", "            b += BLOCK_K\n", ""),
    ("descriptors", "block_product", "a_tiles.load([first_a, start])", "a_tiles.load([first_a + 1, start])"),
    ("descriptors", "block_product", "b_tiles.load([first_b, start])", "b_tiles.load([first_b, 0])"),
    ("descriptors", "block_product", "(tokens, hidden), (hidden, 1)", "(tokens - 1, hidden), (hidden, 1)"),
    ("descriptors", "block_product", "(columns, summed), (summed, 1)", "(columns, summed - 8), (summed, 1)"),
    ("descriptors", "block_product", "== 0, pair % HALF, HALF)", ">= 0, pair % HALF, HALF)"),
    ("descriptors", "block_product", "return first, first + HALF, angle", "return first + HALF, first, angle"),
    ("descriptors", "block_product", "first = pair + block * HALF", "first = pair"),
    ("descriptors", "block_product", "b += tl.load(bias_ptr + b_column", "b += 0 * tl.load(bias_ptr + b_column"),
    ("pointers", "block_product", "round_to(x + bias, ", "round_to(x, "),
    ("descriptors", "block_product", "activate(u.to(tl.float32) + bias,", "activate(u.to(tl.float32),"),
    ("descriptors", "block_product", "h += tl.load(bias_ptr", "h -= tl.load(bias_ptr"),
    ("descriptors", "block_product", "within // rows", "within // GROUP"),
    (
        "descriptors",
        "block_product",
        "tl.num_programs(0)):\n        row_tile, column_tile = _grouped(tile, row_tiles, column_tiles)\n        first, "
        "end",
        "2 * tl.num_programs(0)):\n        row_tile, column_tile = _grouped(tile, row_tiles, column_tiles)\n        "
        "first, end",
    ),
]


@pytest.mark.usefixtures("reference_attention")
def test_without_a_mutation_they_pass(product):
    inputs = make(2, 17, dtype=torch.bfloat16)
    check_run(run_with_grads(inputs), inputs)


@pytest.mark.usefixtures("reference_attention")
@pytest.mark.parametrize(
    ("product_", "module", "old", "new"), [*((list(PRODUCTS)[i % 3], *row) for i, row in enumerate(BOTH)), *ONE]
)
def test_mutations_fail(product_, module, old, new, monkeypatch, tmp_path):
    """In bfloat16, whose bounds are the widest; 34 tokens are two chunks of rows and two tiles."""
    choose(product_, monkeypatch)
    inputs = make(2, 17, dtype=torch.bfloat16)
    mutate(monkeypatch, tmp_path, module, old, new)
    with pytest.raises(AssertionError, match="error"):
        check_run(run_with_grads(inputs), inputs)


@pytest.mark.parametrize(
    ("product_", "module", "old", "new"),
    [
        ("vendor", "numeric", "zero + c3, low, high", "zero, low, high"),
        ("vendor", "block_elementwise", "h *= tl.where(kept, keep_scale, 0.0)", "h *= tl.where(kept, 1.0, 0.0)"),
        ("vendor", "block_elementwise", "d *= tl.where(kept, keep_scale, 0.0)", "d *= tl.where(kept, 0.0, keep_scale)"),
        (
            "descriptors",
            "block_product",
            "seed_high, first_row, first_column",
            "seed_high, first_row + 2, first_column",
        ),
        (
            "descriptors",
            "block_product",
            "h *= tl.where(kept, keep_scale, 0.0)",
            "h *= tl.where(kept, keep_scale, 1.0)",
        ),
    ],
)
def test_mutations_of_the_mask_fail(product_, module, old, new, monkeypatch, tmp_path):
    mutate(monkeypatch, tmp_path, module, old, new)
    choose(product_, monkeypatch)
    with pytest.raises(AssertionError):
        test_residual_mask_is_the_reference_bit_for_bit(product_)


@pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter has one candidate")
@pytest.mark.parametrize("kernel", ["project_in", "project_out"])
def test_every_candidate(kernel, monkeypatch):
    """The first call takes the fastest, right or wrong: here each gets its turn."""
    choose("descriptors", monkeypatch)
    tuner, inputs = getattr(block(), f"_{kernel}_kernel"), make(2, 69, dtype=torch.bfloat16)
    for config in block()._prune(tuner.configs, {}, DESCRIPTORS=torch.cuda.get_device_capability()[0] == 9):
        monkeypatch.setattr(tuner, "early_config_prune", lambda *_, config=config, **__: [config])
        monkeypatch.setattr(tuner, "cache", {})
        check_run(run_with_grads(inputs), inputs)


@pytest.mark.usefixtures("reference_attention")
def test_opcheck():
    inputs = [t.to(DEVICE) for t in make(batch=2, seq=9, dtype=torch.bfloat16)]
    x, parameters = inputs[0].view(18, HIDDEN), inputs[1:7]
    cu = torch.tensor([0, 4, 18], dtype=torch.int32, device=DEVICE)
    positions = torch.arange(18, device=DEVICE).view(2, 9)
    options = (*inputs[7:], positions, cu, None, 9, *dataclasses.replace(SHAPE, **DROPOUT).values, 7, "triton")
    utilities = ("test_schema", "test_faketensor")  # autograd is FusedBlock's, above the ops
    torch.library.opcheck(
        torch.ops.phi1.parallel_block_forward.default, (x, *parameters, True, *options), test_utils=utilities
    )
    y, *saved = torch.ops.phi1.parallel_block_forward(x, *parameters, True, *options)
    arguments = (torch.randn_like(y), x, *saved, *parameters[:5], *options)
    torch.library.opcheck(torch.ops.phi1.parallel_block_backward.default, arguments, test_utils=utilities)


@pytest.mark.usefixtures("reference_attention")
def test_compiles_to_one_graph():
    inputs = [t.to(DEVICE) for t in make(dtype=torch.bfloat16)]
    options = {**DROPOUT, "dropout_seed": 3, "backend": "triton"}
    plain, results = functools.partial(parallel_block, **shaped(options)), []
    function = torch.compile(lambda *a: plain(*a) * 1, fullgraph=True, backend="aot_eager")
    for call in (plain, function):
        leaves = [t.clone().requires_grad_() for t in inputs[:7]]
        y = call(*leaves, *inputs[7:])
        results.append([y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_it_refuses():
    inputs = [t.to(DEVICE) for t in make()]
    with pytest.raises(BackendError, match=r"dtype = torch\.float64"):
        run([t.double() for t in inputs[:7]] + inputs[7:], backend="triton")
    with pytest.raises(BackendError, match=r"head_dim = 16: the kernels are made for 32, 64, 128"):
        run(inputs, backend="triton", heads=8, kv_heads=4, head_dim=16)
