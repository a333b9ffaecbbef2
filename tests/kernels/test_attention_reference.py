"""The reference against the definition, written out element by element; the torch backend against the reference."""

import math

import pytest
import torch
from attention_cases import CASES, OUTPUTS, SEED, Case, check_case, check_results, make_inputs
from torch import Tensor

from kernels import flash_attention, reference


def _philox(counter: list[int], seed: int) -> list[int]:
    """Philox 4x32-10 on Python integers."""
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


# Known answers of Random123 (kat_vectors, philox4x32 10 rounds).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: int, answer: list[int]) -> None:
    words = reference.philox(tuple(torch.tensor([word]) for word in counter), key)  # type: ignore[arg-type]
    assert [int(word) for word in words] == answer
    assert _philox(counter, key) == answer


def test_dropout_keep_is_the_stated_layout() -> None:
    plane, row = 5, 7
    columns = torch.arange(100)
    kept = reference.dropout_keep(SEED, 0, torch.tensor(plane), torch.tensor(row), columns, 0.3)
    held = [0, 1, 8, 9, 16, 17, 24, 25]  # of one thread, in slot order
    for column in range(100):
        thread = column % 8 // 2
        words = _philox([column // 32 * 4 + thread, row, plane, 0], SEED)
        slot = held.index(column % 32 - 2 * thread)
        value = words[slot // 2] >> (16 * (slot % 2)) & 0xFFFF
        assert bool(kept[column]) == (value >= round(0.3 * 65536)), column


def test_dropout_keeps_the_stated_share() -> None:
    row, column = torch.arange(512)[:, None], torch.arange(512)[None, :]
    kept = reference.dropout_keep(SEED, 0, torch.tensor(0), row, column, 0.1)
    # 262,144 draws at 0.9: standard deviation 0.0006.
    assert abs(float(kept.double().mean()) - (1 - round(6553.6) / 65536)) < 5 * 0.0006
    # Unbiased: the scale is one over the exact probability of being kept, not over 1 - p.
    assert reference.dropout_scale(0.1) * (65536 - reference.dropout_threshold(0.1)) == 65536


def _by_definition(
    q: Tensor, k: Tensor, v: Tensor, documents: list[tuple[int, int]], causal: bool, scale: float, p: float
) -> tuple[Tensor, Tensor]:
    """out and lse, one (document, head, query) at a time, from the definition; batch entries are documents here."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full((heads, q.shape[0]), -math.inf, dtype=q.dtype)
    first_q = first_k = 0
    for document, (m, n) in enumerate(documents):
        for head in range(heads):
            for i in range(m):
                seen = [j for j in range(n) if not causal or j <= i + n - m]
                if not seen:
                    continue
                scores = torch.stack([scale * q[first_q + i, head].dot(k[first_k + j, head // group]) for j in seen])
                lse[head, first_q + i] = scores.exp().sum().log()
                weights = scores.exp() / scores.exp().sum()
                row = torch.zeros(q.shape[2], dtype=q.dtype)
                for j, weight in zip(seen, weights, strict=True):
                    thread = j % 8 // 2
                    words = _philox([j // 32 * 4 + thread, i, document * heads + head, 0], SEED)
                    slot = [0, 1, 8, 9, 16, 17, 24, 25].index(j % 32 - 2 * thread)
                    threshold = round(p * 65536)
                    if words[slot // 2] >> (16 * (slot % 2)) & 0xFFFF >= threshold:
                        row = row + weight * (65536 / (65536 - threshold)) * v[first_k + j, head // group]
                out = out.index_put((torch.tensor(first_q + i), torch.tensor(head)), row)
        first_q, first_k = first_q + m, first_k + n
    return out, lse


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True])
def test_reference_is_the_definition(causal: bool, p: float, packed: bool) -> None:
    documents = [(3, 3), (5, 2), (1, 4)] if packed else [(4, 3), (4, 3)]
    rows, columns = sum(m for m, _ in documents), sum(n for _, n in documents)
    heads, kv_heads, dim, scale = 4, 2, 5, 0.4
    generator = torch.Generator().manual_seed(1)
    q, k, v, grad = (
        torch.randn(*shape, dim, dtype=torch.float64, generator=generator)
        for shape in ((rows, heads), (columns, kv_heads), (columns, kv_heads), (rows, heads))
    )
    flat = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = _by_definition(*flat, documents, causal, scale, p)  # type: ignore[arg-type]
    expected_grads = torch.autograd.grad(expected, flat, grad)

    ends = torch.tensor([(0, 0), *documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    cu = {"cu_seqlens_q": ends[:, 0], "cu_seqlens_k": ends[:, 1]} if packed else {}
    shape = (1, -1) if packed else (2, -1)
    inputs = [x.unflatten(0, shape).requires_grad_() for x in (q, k, v)]
    out, lse = flash_attention(
        *inputs, causal=causal, scale=scale, dropout_p=p, dropout_seed=SEED, return_lse=True, backend="reference", **cu
    )
    grads = torch.autograd.grad(out, inputs, grad.unflatten(0, shape))
    torch.testing.assert_close(out.flatten(0, 1), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse.transpose(0, 1).flatten(1), expected_lse, rtol=0, atol=1e-13)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_passes_the_rule(case: Case) -> None:
    check_case(case, torch.float32, "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if not case.dropout_p], ids=lambda case: case.name)
def test_torch_backend(case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype, "torch", lse=False)


def test_torch_backend_compiles_for_lengths_that_vary() -> None:
    compiled = torch.compile(lambda q: flash_attention(q, q, q, backend="torch"), fullgraph=True, backend="aot_eager")
    for length in (5, 9, 33):
        q = torch.randn(1, length, 2, 32)
        torch.testing.assert_close(compiled(q), flash_attention(q, q, q, backend="torch"))


@pytest.mark.parametrize(
    ("dtype", "field", "value"),
    [
        (torch.bfloat16, "causal", False),
        (torch.bfloat16, "scale", 0.13),  # 0.125 is right
        (torch.float32, "scale", 0.12501),
        (torch.bfloat16, "dropout_p", 0.0),
        (torch.bfloat16, "dropout_seed", SEED + (1 << 32)),
        (torch.bfloat16, "kv_shift", 1),
    ],
)
def test_the_rule_bites(dtype: torch.dtype, field: str, value: object) -> None:
    """A mask, scale, seed or key that is slightly wrong breaks the rule."""
    case = next(case for case in CASES if case.name == "dropout")
    q, k, v, grad_out, options = make_inputs(case, dtype)
    if field == "kv_shift":
        k = k.roll(1, dims=1)
    else:
        options[field] = value
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = flash_attention(q, k, v, **options, return_lse=True, backend="reference")
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    caught = []
    for name, result in zip(OUTPUTS, (out.detach(), lse, *grads), strict=True):
        try:
            check_results({name: result}, case, dtype)
        except AssertionError:
            caught.append(name)
    assert caught, f"{field} = {value} passed"
