"""csrc/cuda/block.cuh and the fused block on it, under the emulator and, where there is one, on the GPU."""

import dataclasses

import cuda_block_cases
import pytest
import torch
from cuda_block_cases import (
    CASES,
    RESULTS,
    Case,
    check_block,
    check_projection_in,
    check_projection_out,
    make_inputs,
    run,
)
from torch import Tensor

from kernels import BackendError, BlockShape, cuda, fused_block, parallel_block, reference
from kernels.fused_block import Dropout, Layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = dataclasses.replace(CASES[1], name="small", p=0.25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_after_the_product_with_w_in(cuda_device, case, dtype):
    check_projection_in(case, dtype, cuda_device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "p"), [(1, 8, 0.5), (7, 72, 0.0), (300, 40, 0.1), (6, 1048, 0.3)])
def test_after_the_product_with_w_out(cuda_device, rows, columns, p, dtype):
    check_projection_out(rows, columns, p, dtype, cuda_device)


def test_nan_is_not_dropped(cuda_device):
    """As in the reference, 0 times NaN is NaN: an overflow is seen, whatever the mask."""
    g = torch.full((4, 8), float("nan"), dtype=torch.bfloat16, device=cuda_device)
    one, zero = torch.eye(8, dtype=g.dtype, device=cuda_device), torch.zeros_like(g)
    y = cuda_block_cases.pieces().project_out(g, one, zero[0], zero, Dropout(0.5, 3))
    grad_h, grad_bias = cuda_block_cases.pieces().project_out_backward(g, Dropout(0.5, 3))
    assert y.isnan().all() and grad_h.isnan().all() and grad_bias.isnan().all()


def test_many_chunks_of_rows(cuda_device):
    """More chunks than a block adds up at once, the last of them short."""
    check_projection_in(Case("rows", batch=3, seq=61, heads=1, hidden=8, inner=8), torch.bfloat16, cuda_device)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_formulas_are_the_reference(case):
    tensors, options = make_inputs(case, torch.float64)
    ours = cuda_block_cases.eager(tensors, options, case)
    for name, x, y in zip(RESULTS, ours, run(tensors, options, "reference"), strict=True):
        # The reference rounds the residual's scale to float32.
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_keeps_the_error_rule(cuda_device, case, dtype):
    check_block(case, dtype, cuda_device)


def test_bits_do_not_depend_on_the_order_of_threads(emulator):
    tensors, options = make_inputs(SMALL, torch.bfloat16)
    first = run(tensors, options, "cuda")
    for seed in range(1, 6):
        emulator.set_seed(seed)
        again = run(tensors, options, "cuda")
        for name, x, y in zip(RESULTS, first, again, strict=True):
            assert torch.equal(x, y), (name, seed)


def test_memory_requests_are_dense(emulator):
    """Whole sectors, but where a lane's 8 numbers are float32, two requests of half a sector each: sums and tables."""
    case = Case("dense", seq=64, heads=4, kv_heads=2, head_dim=64, rotary=32, inner=1024)
    check_projection_out(case.tokens, 256, 0.25, torch.bfloat16)
    counters, chunks = emulator.counters(), case.tokens // 16
    assert counters["global_sectors"] - counters["global_sectors_least"] == chunks * 256 * 4 // 32
    assert counters["shared_wavefronts"] == counters["shared_wavefronts_least"] > 0, "bank conflicts"
    emulator.reset_counters()
    check_projection_in(case, torch.bfloat16)
    counters = emulator.counters()
    # cos and sin: one warp has q, k and v, and looks at two sectors of each, in two requests; forward and backward.
    tables = 2 * case.tokens * 4
    sums = chunks * (case.qkv_width + case.inner) * 4 // 32
    assert counters["global_sectors"] - counters["global_sectors_least"] == tables + sums


def _saved_bytes(tensors: list[Tensor], options: dict[str, object]) -> int:
    """Bytes that the graph of one block holds, parameters and the rotary table not counted."""
    leaves = [t.clone().requires_grad_() for t in tensors[:7]]
    known = {t.data_ptr() for t in (*leaves[1:], *tensors[7:])}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = parallel_block(*leaves, *tensors[7:], **options, backend="cuda")
    assert y.requires_grad
    return sum(saved.values())


def test_saves_x_z_and_attention_and_nothing_else(emulator):
    case = CASES[2]
    saved = _saved_bytes(*make_inputs(case, torch.bfloat16))
    attention = case.heads * (2 * case.head_dim + 4)  # its output, and a float32 log-sum-exp a head
    assert saved == case.tokens * (2 * (case.hidden + case.qkv_width + case.inner) + attention)


def test_tensors_that_are_not_dense_give_the_same_bits(emulator):
    """x and the parameters as slices and transposes, one of them off by 2 bytes: as from contiguous copies."""
    case = CASES[1]
    tensors, options = make_inputs(case, torch.bfloat16)
    odd = torch.zeros(tensors[4].numel() + 1, dtype=torch.bfloat16)
    odd[1:] = tensors[4]
    wide = torch.zeros(case.batch, case.seq, case.hidden + 5, dtype=torch.bfloat16)
    wide[..., 5:] = tensors[0]
    strided = [
        wide[..., 5:],
        *tensors[1:3],
        tensors[3].T.contiguous().T,
        odd[1:],
        tensors[5].T.contiguous().T,
        *tensors[6:],
    ]
    with torch.no_grad():
        ours, dense = (parallel_block(*t, **options, backend="cuda") for t in (strided, tensors))
    assert torch.equal(ours, dense)
    x = torch.randn(4, 41).to(torch.bfloat16)
    pieces = cuda_block_cases.pieces()
    for grad in (x[:, 1:], x.flatten()[1:161].view(4, 40)):  # rows apart; off by 2 bytes
        for p in (0.0, 0.25):
            for a, b in zip(
                pieces.project_out_backward(grad, Dropout(p, 3)),
                pieces.project_out_backward(grad.contiguous().clone(), Dropout(p, 3)),
                strict=True,
            ):
                assert torch.equal(a, b)


@pytest.mark.parametrize("steps", [[1] * 4, [3, 1]], ids=str)
def test_cache_equals_the_whole_sequence(emulator, steps):
    case = Case("cache", batch=2, seq=4)
    tensors, options = make_inputs(case, torch.bfloat16)
    with torch.no_grad():
        whole = parallel_block(*tensors, **options, backend="cuda")
        cache = [torch.zeros(2, 8, case.kv_heads, case.head_dim, dtype=torch.bfloat16) for _ in range(2)]
        parts, at = [], 0
        for step in steps:
            part = [tensors[0][:, at : at + step], *tensors[1:]]
            positions = torch.arange(at, at + step)
            parts.append(parallel_block(*part, **options, positions=positions, kv_cache=(*cache, at), backend="cuda"))
            at += step
    # The products of W_in and W_out may round otherwise for another number of rows.
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=2**-7, atol=2**-7)


def test_opcheck(emulator):
    case = CASES[3]
    tensors, options = make_inputs(case, torch.bfloat16)
    x, parameters = tensors[0].view(case.tokens, case.hidden), tensors[1:7]
    operator_options = (
        *tensors[7:],
        options["positions"],
        options["cu_seqlens"],
        torch.tensor(7),
        case.seq,
        *options["shape"].values,
        7,
        "cuda",
    )
    utilities = ("test_schema", "test_faketensor")  # autograd is FusedBlock's, above the ops
    forward, backward = torch.ops.phi1.parallel_block_forward.default, torch.ops.phi1.parallel_block_backward.default
    torch.library.opcheck(forward, (x, *parameters, True, *operator_options), test_utils=utilities)
    y, *saved = forward(x, *parameters, True, *operator_options)
    arguments = (torch.randn_like(y), x, *saved, *parameters[:5], *operator_options)
    torch.library.opcheck(backward, arguments, test_utils=utilities)


def test_compiles_to_one_graph(emulator):
    tensors, options = make_inputs(SMALL, torch.bfloat16)
    expected = run(tensors, options, "cuda")
    function = torch.compile(
        lambda *t: parallel_block(*t, **options, backend="cuda") * 1, fullgraph=True, backend="aot_eager"
    )
    leaves = [t.clone().requires_grad_() for t in tensors[:7]]
    found = cuda_block_cases._gradients(function(*leaves, *tensors[7:]), leaves)
    for name, x, y in zip(RESULTS, found, expected, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({}, torch.float32, "dtype = torch.float32: the kernels multiply bfloat16 or float16"),
        ({"head_dim": 48}, torch.bfloat16, "head_dim = 48: the kernels are made for 32, 64, 128"),
        ({"hidden": 36}, torch.bfloat16, r"x.shape\[-1\] = 36: the kernels take a multiple of 8; pad it with zeros"),
        (
            {"inner": 20},
            torch.bfloat16,
            r"inner \(w_in's rows beyond q, k and v\) = 20: the kernels take a multiple of 8",
        ),
        ({"rotary": 8}, torch.bfloat16, r"cos.shape\[-1\] = 8: the kernels turn a multiple of 16 dims"),
    ],
)
def test_what_the_kernels_are_not_made_for_is_refused(emulator, change, dtype, message):
    tensors, options = make_inputs(dataclasses.replace(CASES[1], **change), dtype)
    with pytest.raises(BackendError, match=message):
        parallel_block(*tensors, **options, backend="cuda")
    assert emulator.counters()["launches"] == 0


def test_bad_input(emulator):
    tensors, options = make_inputs(CASES[1], torch.bfloat16)
    with pytest.raises(ValueError, match=r"cos.shape = \(5, 16\): 11 tokens need 11 rows"):
        parallel_block(*tensors[:7], *reference.rotary_table(5, 32), **options, backend="cuda")
    tensors[1] = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"norm_weight.shape = \(3,\): must be \(40,\)"):
        parallel_block(*tensors, **options, backend="cuda")
    assert emulator.counters()["launches"] == 0


def test_more_tokens_than_an_index_counts():
    none = torch.zeros(0, 8, dtype=torch.bfloat16)
    layout = Layout(BlockShape(1, 1, 32), 2**10, 2**20, 8, *reference.rotary_table(1, 32), None)
    with pytest.raises(ValueError, match=r"batch \* seq = 1073741824: the cuda backend counts tokens up to 1073741823"):
        cuda._after_in_arguments(none, none, none, layout)


def test_positions_beyond_the_table_die(emulator, monkeypatch):
    """Under the emulator; a GPU is not asked, since looking at the positions would stop the stream."""
    monkeypatch.setattr(fused_block, "check_positions", lambda *_: None)  # which CPU tensors meet first
    tensors, options = make_inputs(CASES[1], torch.bfloat16)
    options["positions"] = torch.full((11,), 96)
    with pytest.raises(RuntimeError, match=r"kernel after_in.*ld.global: global address .* outside the tensors"):
        parallel_block(*tensors, **options, backend="cuda")
