"""The reference against the definition, written out element by element; the torch backend against the reference."""

import math

import pytest
import torch
from attention_cases import CASES, OUTPUTS, SEED, Case, check_case, check_results, make_inputs
from torch import Tensor

from kernels import flash_attention, reference


def _philox(counter: list[int], seed: int) -> list[int]:
    """Philox 4x32-7 on Python integers."""
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(7):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


# Known answers of Random123 (kat_vectors, philox4x32 7 rounds).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, 0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: int, answer: list[int]) -> None:
    words = reference.philox(tuple(torch.tensor([word]) for word in counter), key)  # type: ignore[arg-type]
    assert [int(word) for word in words] == answer
    assert _philox(counter, key) == answer


def _attention_byte(seed: int, plane: int, query: int, key: int) -> int:
    """The element's place among the 16 of a Philox call, looked up: queries {0, 1, 8, 9} + 2 b, keys {0, 1, 8, 9} + 2
    d.
    """
    held = [0, 1, 8, 9]
    (a, b), (c, d) = (divmod(x // 16 * 4 + x % 8 // 2, 4) for x in (query, key))
    i, j = held.index(query - 16 * a - 2 * b), held.index(key - 16 * c - 2 * d)
    word, byte = 2 * (i % 2) + j % 2, 2 * (i // 2) + j // 2
    return _philox([4 * c + d, 4 * a + b, plane, 0], seed)[word] >> (8 * byte) & 0xFF


def test_attention_keep_is_the_stated_layout() -> None:
    plane, query, key = 5, torch.arange(20, 40), torch.arange(50)
    kept = reference.attention_keep(SEED, torch.tensor(plane), query[:, None], key[None, :], 0.3)
    expected = [[_attention_byte(SEED, plane, i, j) >= 77 for j in key.tolist()] for i in query.tolist()]
    assert kept.tolist() == expected


def test_residual_keep_is_the_stated_layout() -> None:
    kept = reference.residual_keep(SEED, 5, 30, 0.3, torch.device("cpu"))
    for row in range(5):
        for column in range(30):
            words = _philox([column // 8, row // 2, 0, 1], SEED)
            byte = b"".join(word.to_bytes(4, "little") for word in words)[8 * (row % 2) + column % 8]
            assert bool(kept[row, column]) == (byte >= 77), (row, column)


GOLDEN_ATTENTION = [
    0xFA4417DA,
    0x0AD6B100,
    0xC51C823F,
    0xD135C494,
    0x3CB06889,
    0x38762946,
    0xD7F3126D,
    0xF2262DCD,
]
GOLDEN_RESIDUAL = [0x09CD142E, 0xEBA792A8, 0x76EFED80, 0x2B85945E]
"""Bit j of word i: is element (i, j) kept."""


def test_dropout_masks_do_not_change() -> None:
    """A training run that goes on draws the masks that it drew before: these bits are for ever."""
    index = torch.arange(32)
    kept = reference.attention_keep(0x123456789ABCDEF, torch.tensor(3), index[:8, None], index[None, :], 0.5)
    found = [sum(int(bit) << j for j, bit in enumerate(row)) for row in kept.tolist()]
    assert found == GOLDEN_ATTENTION
    rows = reference.residual_keep(0x123456789ABCDEF, 4, 32, 0.5, torch.device("cpu")).tolist()
    assert [sum(int(bit) << j for j, bit in enumerate(row)) for row in rows] == GOLDEN_RESIDUAL


@pytest.mark.parametrize(
    ("p", "threshold"),
    [(0.0, 0), (1e-9, 1), (0.002, 1), (0.1, 26), (0.125, 32), (0.5, 128), (0.999, 255), (1 - 1e-9, 255)],
)
def test_dropout_threshold_is_the_nearest_of_256(p: float, threshold: int) -> None:
    """The least p drops something, the greatest not everything; the scale is one over the exact share that is kept."""
    assert reference.dropout_threshold(p) == threshold
    assert reference.dropout_scale(p) * (256 - threshold) == 256


# ---------------------------------------------------------------------------------------------- statistics of the mask

ROWS, COLUMNS = 512, 1024


def _attention_mask(p: float, seed: int = SEED, plane: int = 2, rows: int = ROWS) -> Tensor:
    row, column = torch.arange(rows)[:, None], torch.arange(COLUMNS)[None, :]
    return reference.attention_keep(seed, torch.tensor(plane), row, column, p)


def _residual_mask(p: float, seed: int = SEED, rows: int = ROWS) -> Tensor:
    return reference.residual_keep(seed, rows, COLUMNS, p, torch.device("cpu"))


MASKS = {"attention": _attention_mask, "residual": _residual_mask}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_dropout_drops_the_stated_share(name: str, p: float) -> None:
    """In all, and of each place in a Philox call: within 5 standard deviations of a binomial distribution."""
    dropped, share = ~MASKS[name](p), reference.dropout_threshold(p) / 256
    deviation = (share * (1 - share)) ** 0.5
    assert abs(float(dropped.double().mean()) - share) < 5 * deviation / (ROWS * COLUMNS) ** 0.5
    places = dropped.double().unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).mean((0, 2))  # each of 16 x 16
    assert float((places - share).abs().max()) < 5 * deviation / (ROWS * COLUMNS / 256) ** 0.5


def _dependence(a: Tensor, b: Tensor, share: float) -> float:
    """Correlation of two masks in standard deviations of what independent ones have."""
    x, y = (a.double() - (1 - share)).flatten(), (b.double() - (1 - share)).flatten()
    return float((x * y).mean()) / (share * (1 - share)) * x.numel() ** 0.5


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_of_neighbours_is_independent(name: str, p: float) -> None:
    """Of elements (down, right) apart, whether one Philox call, one word or calls with neighbouring counters drew
    them.
    """
    kept, share = MASKS[name](p), reference.dropout_threshold(p) / 256
    steps = [(i, j) for i in (0, 1, 2, 7, 8, 9, 16, 64) for j in (0, 1, 2, 4, 7, 8, 9, 16, 32, 64) if i or j]
    for down, right in steps:
        one, other = kept[: ROWS - down, : COLUMNS - right], kept[down:, right:]
        assert abs(_dependence(one, other, share)) < 5, (down, right)
        mirrored = kept[: ROWS - down, right:], kept[down:, : COLUMNS - right]
        assert abs(_dependence(*mirrored, share)) < 5, (down, -right)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_of_other_seeds_planes_and_places_is_independent(p: float) -> None:
    share = reference.dropout_threshold(p) / 256
    masks = [_attention_mask(p), _residual_mask(p), _attention_mask(p).T.reshape(ROWS, COLUMNS)]
    masks += [_attention_mask(p, SEED ^ 1 << bit) for bit in (0, 1, 31, 32, 52, 63)]
    masks += [_attention_mask(p, plane=plane) for plane in (0, 1, 3, 1 << 20)]
    masks += [_residual_mask(p, SEED ^ 1 << bit) for bit in (0, 32, 52)]
    for i, one in enumerate(masks):
        for j, other in enumerate(masks[:i]):
            assert abs(_dependence(one, other, share)) < 5, (i, j)


@pytest.mark.parametrize("name", MASKS)
def test_every_byte_is_as_frequent(name: str) -> None:
    """Chi-square of the 256 values, which the masks of all thresholds give: 255 degrees of freedom, 5 deviations."""
    value = sum(MASKS[name](threshold / 256, rows=64).long() for threshold in range(1, 256))
    assert isinstance(value, Tensor)
    counts, expected = torch.bincount(value.flatten(), minlength=256).double(), value.numel() / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


def test_statistics_notice_a_call_for_32_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share is right; but elements 16 keys apart would be dropped together."""
    keep = reference.attention_keep
    monkeypatch.setattr(
        reference, "attention_keep", lambda *args: keep(*args[:3], args[3] // 32 * 32 + args[3] % 16, args[4])
    )
    test_dropout_drops_the_stated_share("attention", 0.5)
    with pytest.raises(AssertionError, match="16"):
        test_dropout_of_neighbours_is_independent("attention", 0.5)


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
                    threshold = round(256 * p)
                    if _attention_byte(SEED, document * heads + head, i, j) >= threshold:
                        row = row + weight * (256 / (256 - threshold)) * v[first_k + j, head // group]
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
