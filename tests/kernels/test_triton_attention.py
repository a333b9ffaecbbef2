"""Triton's flash attention by the shared cases: on a GPU compiled, elsewhere in Triton's interpreter."""

import functools

import pytest
import torch
import triton
from attention_cases import CASES, SEED, Case, check_case, check_results, make_inputs, run_case
from triton_mutation import mutate

import kernels.triton.attention as triton_attention
from kernels import BackendError, flash_attention, reference
from kernels.triton.attention_tuning import candidates

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# On a GPU attention refuses float32.
DTYPES = [torch.bfloat16, torch.float16] if GPU else [torch.bfloat16, torch.float32, torch.float16]
PRECISE = torch.float16 if GPU else torch.float32
# On a GPU every case in every dtype, with what is faster. The interpreter takes milliseconds an operation: there, each
# case in one dtype with descriptors, where it can have them, and the shorter of these in another with pointers.
HOPPER = not GPU or torch.cuda.get_device_capability()[0] == 9
RUNS = [
    (case, dtype, "descriptors" if HOPPER else "pointers")
    for i, case in enumerate(CASES)
    for j, dtype in enumerate(DTYPES)
    if GPU or j == i % 3
]
RUNS += [
    (case, dtype, "pointers")
    for i, case in enumerate(CASES)
    for j, dtype in enumerate(DTYPES)
    if ((GPU and HOPPER) or (not GPU and j == (i + 1) % 3))
    and not case.documents
    and case.strided != "misaligned"
    and case.seqlen_q < 150
]


@pytest.mark.parametrize(("case", "dtype", "loads"), RUNS, ids=lambda x: x.name if isinstance(x, Case) else str(x))
def test_case(case, dtype, loads):
    check_case(case, dtype, f"triton/{loads}", DEVICE)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("documents", [(), ((33, 65), (40, 30))], ids=["batch", "documents"])
def test_dropout_mask_is_the_reference_bit_for_bit(head_dim, documents):
    """v = the first unit vectors makes the output the dropped probabilities themselves: zero exactly where dropped."""
    n = 95 if documents else 70
    case = Case(
        "mask",
        batch=1 if documents else 2,
        seqlen_q=73,
        seqlen_k=n,
        heads=1 if documents else 2,
        kv_heads=1,
        head_dim=head_dim,
        causal=False,
        dropout_p=0.3,
        documents=documents,
    )
    q, k, _, _, options = make_inputs(case, PRECISE, DEVICE)
    for first in range(0, n, head_dim):
        v = torch.zeros_like(k)
        width = min(head_dim, n - first)
        v[:, first : first + width, :, :width] = torch.eye(width, dtype=v.dtype, device=DEVICE)[:, None]
        found = flash_attention(q, k, v, **options, backend="triton")
        expected = flash_attention(q, k, v, **options, backend="reference")
        assert torch.equal(found == 0, expected == 0)


def test_gradients_are_bitwise_reproducible():
    case = Case("repeat", batch=1, seqlen_q=70, seqlen_k=70, heads=2, kv_heads=1, dropout_p=0.1)
    first = run_case(case, torch.bfloat16, "triton", DEVICE)
    for _ in range(50 if GPU else 1):
        again = run_case(case, torch.bfloat16, "triton", DEVICE)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter runs one program after another")
def test_a_thousand_runs_agree():
    case = Case("race", batch=4, seqlen_q=513, seqlen_k=513, heads=8, kv_heads=4, dropout_p=0.1)
    q, k, v, _, options = make_inputs(case, torch.bfloat16, DEVICE)
    first = flash_attention(q, k, v, **options, backend="triton")
    for _ in range(1000):
        assert torch.equal(flash_attention(q, k, v, **options, backend="triton"), first)


def test_negative_and_zero_scale():
    for scale in (-0.2, 0.0):
        check_case(Case("scale", batch=1, seqlen_q=40, seqlen_k=66, scale=scale), PRECISE, "triton", DEVICE)


@pytest.mark.parametrize("strided", ["", "packed", "transposed"])
@pytest.mark.parametrize("documents", [(), ((33, 33), (37, 37))], ids=["batch", "documents"])
def test_writes_where_the_caller_says(documents, strided):
    """out and grads: new tensors and views of wider ones hold the same bits, and what lies beside a view stays."""
    case = Case(
        "out",
        batch=1,
        seqlen_q=70,
        seqlen_k=70,
        heads=2,
        kv_heads=1,
        head_dim=32,
        documents=documents,
        dropout_p=0.1,
        scale=-0.2,
        strided=strided,
    )
    q, k, v, grad, options = make_inputs(case, torch.bfloat16, DEVICE)
    out = make_inputs(case, torch.bfloat16, DEVICE)[0]  # a view of NaNs where strided
    base, here = out._base if out._base is not None else out, out.data_ptr()
    expected, lse = flash_attention(q, k, v, **options, return_lse=True, backend="triton")
    beside = int(base.isnan().sum())
    found = flash_attention(q, k, v, **options, out=out, backend="triton")
    assert found.data_ptr() == here and torch.equal(out, expected) and int(base.isnan().sum()) == beside
    if strided == "transposed":  # grads have contiguous last dims
        return
    arguments = (grad, q, k, v, expected, lse, options.get("cu_seqlens_q"), options.get("cu_seqlens_k"))
    arguments += (True, -0.2, 0.1, SEED)
    grads = make_inputs(case, torch.bfloat16, DEVICE)[:3]
    pointers = [x.data_ptr() for x in grads]
    backward = functools.partial(triton_attention.attention_backward, *arguments, by_descriptors=True)
    for a, b, pointer in zip(backward(grads=grads), backward(), pointers, strict=True):
        assert a.data_ptr() == pointer and torch.equal(a, b) and not bool(b.isnan().any())


@pytest.mark.parametrize(
    "mutation", ["top_left", "window", "scale", "lse", "no_dropout_scale", "other_plane", "dropped_tile", "delta"]
)
def test_mutations_fail(mutation, monkeypatch):
    """A wrong mask, scale, lse, dropout or a tile left out is outside the bound, in bfloat16, the widest."""
    case = Case("mutation", batch=1, seqlen_q=70, seqlen_k=100, heads=2, kv_heads=1, head_dim=32, dropout_p=0.2)
    forward, backward = triton_attention.attention_forward, triton_attention.attention_backward

    def mutate(function):
        def run(*arguments, by_descriptors):  # flash_attention gives neither out= nor grads= here
            given = functools.partial(function, by_descriptors=by_descriptors)
            head, (cu_q, cu_k, causal, scale, p, seed) = arguments[:-6], arguments[-6:]
            if mutation == "window":
                causal = False
            elif mutation == "scale":
                scale *= 1.05
            elif mutation == "other_plane":
                seed += 1
            results = given(*head, cu_q, cu_k, causal, scale, p, seed)
            if function is forward:
                out, lse = results
                if mutation == "top_left":
                    q, k, v = head
                    return given(q, k[:, : q.shape[1]], v[:, : q.shape[1]], cu_q, cu_k, causal, scale, p, seed)
                if mutation == "dropped_tile":
                    q, k, v = head
                    return given(q, k[:, 64:], v[:, 64:], cu_q, cu_k, causal, scale, p, seed)
                if mutation == "lse":
                    return out, lse / 1.4426950408889634  # in base 2
                if mutation == "no_dropout_scale":
                    return out / reference.dropout_scale(p), lse
            elif mutation == "delta":
                grad, q, k, v, out, lse = head
                return given(grad, q, k, v, torch.zeros_like(out), lse, cu_q, cu_k, causal, scale, p, seed)
            return results

        return run

    monkeypatch.setattr(triton_attention, "attention_forward", mutate(forward))
    monkeypatch.setattr(triton_attention, "attention_backward", mutate(backward))
    results = run_case(case, torch.bfloat16, "triton", DEVICE)
    with pytest.raises(AssertionError, match="error of"):
        check_results(results, case, torch.bfloat16)


TALL = Case("tall", batch=2, seqlen_q=70, seqlen_k=100, heads=2, kv_heads=1, head_dim=32, dropout_p=0.2)
PACKED = Case("packed", batch=1, heads=2, head_dim=32, documents=((33, 33), (37, 37)))


@pytest.mark.skipif(GPU, reason="needs Triton's interpreter: a GPU may choose pointers")
@pytest.mark.parametrize(
    ("case", "module", "old", "new"),
    [
        (TALL, "attention_tiles", "matrix[2], first, 0]", "matrix[2], 0, 0]"),
        (TALL, "attention_tiles", "return descriptor, batch, head", "return descriptor, 0, head"),
        (TALL, "attention_tiles", "return descriptor, batch, head", "return descriptor, batch, 0"),
        (PACKED, "attention", "cu_q is None and descriptors", "descriptors"),
    ],
)
def test_mutations_of_descriptors_fail(case, module, old, new, monkeypatch, tmp_path):
    mutate(monkeypatch, tmp_path, module, old, new)
    with pytest.raises(AssertionError, match="error of"):
        check_case(case, torch.bfloat16, "triton/descriptors", DEVICE)


@pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter has one candidate")
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_every_candidate_of_phi1(kernel, monkeypatch):
    """The first call takes the fastest, right or wrong: here each gets its turn."""
    case = Case("candidates", batch=1, seqlen_q=300, seqlen_k=300, heads=4, kv_heads=2, dropout_p=0.1)
    tuner = getattr(triton_attention, f"_{kernel}")
    call = (kernel, 64, torch.bfloat16, True, True, False, torch.cuda.get_device_capability()[0] == 9)
    for (m, n, warps, stages), tma in candidates(*call):
        config = triton.Config({"BLOCK_M": m, "BLOCK_N": n, "TMA": tma}, num_warps=warps, num_stages=stages)
        monkeypatch.setattr(tuner, "early_config_prune", lambda *_, config=config, **__: [config])
        monkeypatch.setattr(tuner, "cache", {})
        check_case(case, torch.bfloat16, "triton", DEVICE)


def test_opcheck():
    case = Case("opcheck", batch=1, seqlen_q=5, seqlen_k=7, heads=2, kv_heads=1, head_dim=32, strided="packed")
    q, k, v, grad, _ = make_inputs(case, torch.float32, DEVICE)
    options = (None, None, None, True, 0.2, 0.1, SEED, "triton")
    torch.library.opcheck(torch.ops.phi1.attention_forward.default, (q, k, v, *options))
    out, lse = torch.ops.phi1.attention_forward(q, k, v, *options)
    torch.library.opcheck(torch.ops.phi1.attention_backward.default, (grad, q, k, v, out, lse, *options))


def test_compiles_to_one_graph():
    case = Case("compile", batch=1, seqlen_q=33, seqlen_k=33, heads=2, kv_heads=1, head_dim=32, dropout_p=0.1)
    q, k, v, grad, options = make_inputs(case, PRECISE, DEVICE)
    function = functools.partial(flash_attention, **options, backend="triton")
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_what_it_refuses():
    q = torch.zeros(1, 4, 1, 80, device=DEVICE)
    with pytest.raises(
        BackendError, match=r"head_dim = 80: the kernels are made for 32, 64, 128; pad q, k and v; able: reference"
    ):
        flash_attention(q, q, q, backend="triton")
    q = torch.zeros(1, 4, 1, 64, device=DEVICE, dtype=torch.float64)
    with pytest.raises(BackendError, match=r"dtype = torch\.float64"):
        flash_attention(q, q, q, backend="triton")
