"""The network: parameter counts, masks, cache, dropout, types, torch.compile. Agreement with transformers is in
huggingface/test_folders.py."""

import dataclasses
import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import phi1.model
from phi1.config import PRESETS, ModelConfig
from phi1.errors import UserError
from phi1.model import Phi1, document_positions

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    max_positions=64,
)

# Logits here are of order 1 and sums have fewer than 100 terms: float32 rounding is below 100 * 2^-24 = 6e-6.
TOLERANCE = 1e-5


def random_model(config: ModelConfig = TINY, seed: int = 0, compute_dtype: torch.dtype | None = None) -> Phi1:
    """Every parameter random: a bias or a LayerNorm weight that is never used would not be noticed at 0 and 1."""
    model = Phi1(config, compute_dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + name.endswith("norm_weight"))
    return model


def random_tokens(batch: int, time: int, seed: int = 0, config: ModelConfig = TINY) -> Tensor:
    return torch.randint(config.vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("preset", "count"), [("phi1", 1_418_270_720), ("phi1-small", 356_794_368)])
def test_parameter_counts_are_the_papers(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = Phi1(PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_initial_weights() -> None:
    model = Phi1(dataclasses.replace(PRESETS["phi1-tiny"], num_layers=1))
    model.reset_parameters(torch.Generator().manual_seed(1))
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # The standard deviation of n samples is off by 1 / sqrt(2 n), here at most 0.2%: 5 of those.
            assert parameter.std().item() == pytest.approx(std, rel=5 / (2 * parameter.numel()) ** 0.5), name
            assert abs(parameter.mean().item()) < 5 * std / parameter.numel() ** 0.5, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("norm_weight"))), name
    first = model.blocks[0].w_in.clone()
    model.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(model.blocks[0].w_in, first)


def test_tokens_see_the_past_only() -> None:
    model, tokens = random_model(), random_tokens(2, 20)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % TINY.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert ((before - after).abs().amax(-1)[:, 12:] > 100 * TOLERANCE).all()


def test_document_masking_equals_documents_on_their_own() -> None:
    model, tokens = random_model(), random_tokens(2, 16)
    bounds = [0, 5, 16, 17, 32]  # row 0: 5 and 11 tokens; row 1: 1 and 15
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    flat = tokens.flatten()
    with torch.no_grad():
        packed = model(tokens, cu_seqlens=cu_seqlens).flatten(0, 1)
        alone = torch.cat([model(flat[None, a:b])[0] for a, b in itertools.pairwise(bounds)])
        concatenated = model(tokens).flatten(0, 1)
    torch.testing.assert_close(packed, alone, atol=TOLERANCE, rtol=0)
    # Plain concatenation differs where a token has another document before it, and only there.
    differing = ((packed - concatenated).abs().amax(-1) > 100 * TOLERANCE).nonzero().flatten().tolist()
    assert differing == [*range(5, 16), *range(17, 32)]


def test_document_positions() -> None:
    padded = torch.tensor([0, 3, 4, 9, 9, 9], dtype=torch.int32)  # padded to a fixed length with empty documents
    assert document_positions(padded, 9).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]


def test_given_positions_replace_the_derived_ones() -> None:
    model, tokens = random_model(), random_tokens(1, 9)
    with torch.no_grad():
        shifted = model(tokens, positions=torch.arange(30, 39))
        # Rotary attention knows relative positions only.
        torch.testing.assert_close(shifted, model(tokens), atol=TOLERANCE, rtol=0)
        stretched = model(tokens, positions=torch.arange(0, 18, 2))
    assert (stretched - shifted).abs().max() > 100 * TOLERANCE


def test_loss_is_the_summed_cross_entropy_of_the_logits() -> None:
    model, tokens = random_model(), random_tokens(3, 11)
    targets = random_tokens(3, 11, seed=1)
    targets[0, :4] = -100
    loss = model(tokens, targets=targets)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, other in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cache_gives_the_logits_of_one_pass(kv_heads: int) -> None:
    model = random_model(dataclasses.replace(TINY, num_kv_heads=kv_heads))
    tokens = random_tokens(2, 20)
    cache = model.new_cache(2, 20)
    with torch.inference_mode():
        pieces = [model(piece, cache=cache) for piece in tokens.split([7, 1, 1, 8, 3], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=TOLERANCE, rtol=0)
    assert cache.length == 20 and cache.keys.shape == (3, 2, 20, kv_heads, 16)


def test_packed_cache_gives_the_logits_of_one_pass() -> None:
    """Rows that go on at their own pace: two prompts at once, one of them alone, then one of each with a third."""
    model, tokens = random_model(), random_tokens(3, 20)
    whole, cache, at = model(tokens), model.new_cache(3, 20), [0, 0, 0]
    with torch.inference_mode():
        for new in ((5, 9, 0), (1, 0, 0), (1, 1, 7), (0, 0, 13), (13, 10, 0)):
            pieces = [tokens[row, at[row] : at[row] + n] for row, n in enumerate(new)]
            offsets = torch.tensor([0, *new]).cumsum(0).int()
            logits = model(torch.cat(pieces)[None], cu_seqlens=offsets, cache=cache)[0]
            for row, part in enumerate(logits.split(list(new))):
                expected = whole[row, at[row] : at[row] + new[row]]
                torch.testing.assert_close(part, expected, atol=TOLERANCE, rtol=0)
                at[row] += new[row]
    assert isinstance(cache.length, torch.Tensor) and cache.length.tolist() == at == [20, 20, 20]
    with pytest.raises(UserError, match=r"cache\.length differs between rows: give cu_seqlens"):
        model(tokens[:, :1], cache=cache)


def test_more_tokens_than_positions_is_a_user_error() -> None:
    model = random_model()
    with pytest.raises(UserError, match="65 tokens: the model has 64 positions"):
        model(random_tokens(1, 65))
    cache = model.new_cache(1, 70)
    with torch.inference_mode():
        model(random_tokens(1, 64), cache=cache)
        with pytest.raises(UserError, match="65 tokens"):
            model(random_tokens(1, 1), cache=cache)


def test_meta_model_becomes_real_and_its_rotary_table_stays_float32() -> None:
    model, tokens = random_model(), random_tokens(1, 40)
    with torch.device("meta"):
        loaded, emptied = Phi1(TINY), Phi1(TINY)
    assert loaded.rotary_cos.is_meta and "rotary_cos" not in loaded.state_dict()
    loaded.load_state_dict(model.state_dict(), assign=True)
    emptied = emptied.to_empty(device="cpu")
    emptied.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))
        assert torch.equal(emptied(tokens), model(tokens))
    for other in (loaded.to(torch.bfloat16), emptied.half().float()):
        assert other.rotary_sin.dtype == torch.float32
        assert torch.equal(other.rotary_sin, model.rotary_sin)
    angle = torch.tensor(37.0) * 10000.0 ** -torch.tensor(2 / 8)  # position 37, pair 1 of rotary_dim 8
    torch.testing.assert_close(model.rotary_cos[37, 1], angle.cos(), atol=1e-6, rtol=0)


def test_dropout_follows_its_seed_and_only_in_training() -> None:
    config = dataclasses.replace(TINY, attention_dropout=0.2, residual_dropout=0.1)
    model, tokens = random_model(config), random_tokens(2, 16)
    plain = random_model()(tokens)
    assert torch.equal(model.eval()(tokens, dropout_seed=1), plain)
    model.train()
    assert torch.equal(model(tokens, dropout_seed=1), model(tokens, dropout_seed=1))
    assert torch.equal(model(tokens, dropout_seed=torch.tensor(1)), model(tokens, dropout_seed=1))
    assert (model(tokens, dropout_seed=1) - model(tokens, dropout_seed=2)).abs().max() > 100 * TOLERANCE
    for field in ("attention_dropout", "residual_dropout"):  # each does something of its own
        only = random_model(dataclasses.replace(config, **{field: 0.0})).train()
        assert (only(tokens, dropout_seed=1) - model(tokens, dropout_seed=1)).abs().max() > 100 * TOLERANCE


def test_every_call_and_layer_has_a_dropout_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def record(x: Tensor, *_: object, dropout_seed: int, **__: object) -> Tensor:
        seeds.append(dropout_seed)
        return x

    monkeypatch.setattr(phi1.model, "parallel_block", record)
    model = random_model()
    calls = [*range(50), 2**63 - 1, 6_530_219_459_687_219_129]  # counted, and hashed
    for seed in calls:
        model(random_tokens(1, 2), dropout_seed=seed)
    assert len(set(seeds)) == len(seeds) == len(calls) * TINY.num_layers
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_compute_dtype_keeps_float32_masters() -> None:
    master, tokens = random_model(compute_dtype=torch.bfloat16), random_tokens(2, 12)
    with torch.no_grad():
        for block in master.blocks:
            block.b_mlp.zero_()  # a sum of two biases rounds once here, twice in a bfloat16 model
    low = random_model()
    low.load_state_dict(master.state_dict())
    low.to(torch.bfloat16)
    logits = master(tokens)
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, low(tokens))
    assert master.new_cache(1, 4).keys.dtype == torch.bfloat16
    loss = master(tokens, targets=tokens)
    assert loss.dtype == torch.float32
    loss.backward()
    exact = random_model()
    exact.load_state_dict(master.state_dict())
    exact(tokens, targets=tokens).backward()
    for (name, parameter), other in zip(master.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None
        assert parameter.grad.dtype == torch.float32
        # bfloat16 rounds to 2^-9; the errors of three layers add up to a few per cent of a gradient's norm.
        assert (parameter.grad - other.grad).norm() < 0.1 * other.grad.norm(), name


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_compiles_to_one_graph_whatever_the_seed(packed: bool) -> None:
    torch._dynamo.reset()
    config = dataclasses.replace(TINY, num_layers=2, attention_dropout=0.1, residual_dropout=0.1)
    model = random_model(config).train()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    tokens = random_tokens(2, 16)
    options = {"cu_seqlens": torch.tensor([0, 5, 16, 32], dtype=torch.int32)} if packed else {}
    for seed in (3, 2**62 + 1, 5):
        model.zero_grad()
        loss = compiled(tokens, targets=tokens, dropout_seed=seed, **options)
        loss.backward()
        gradient = model.blocks[0].w_in.grad.clone()
        model.zero_grad()
        expected = model(tokens, targets=tokens, dropout_seed=seed, **options)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, model.blocks[0].w_in.grad, rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == 2  # the first seed as a constant, then one graph for all others


def test_inductor_agrees() -> None:
    torch._dynamo.reset()
    model = random_model(dataclasses.replace(TINY, num_layers=1, attention_dropout=0.1, residual_dropout=0.1)).train()
    compiled = torch.compile(model, fullgraph=True)
    tokens = random_tokens(2, 16)
    for seed in (3, 2**62 + 1):
        loss = compiled(tokens, targets=tokens, dropout_seed=seed)
        torch.testing.assert_close(loss, model(tokens, targets=tokens, dropout_seed=seed), rtol=1e-6, atol=0)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_under_autocast_train(dtype: torch.dtype, checkpointed: bool) -> None:
    """Loss and gradients are those of compute_dtype, bit for bit, and as near to float64 as the rule asks; the backward
    pass runs outside the region, with a GradScaler's factor in it."""
    tokens, scale = random_tokens(2, 12), 1024.0

    def gradients(model: Phi1, region: torch.dtype | None) -> list[Tensor]:
        def loss(tokens: Tensor) -> Tensor:
            return model(tokens, targets=tokens) / tokens.numel()

        with torch.autocast("cpu", region, enabled=region is not None):
            value = checkpoint(loss, tokens, use_reentrant=False) if checkpointed else loss(tokens)
        assert value.dtype == (torch.float64 if model.embedding.dtype == torch.float64 else torch.float32)
        (scale * value).backward()
        return [value.detach(), *(p.grad / scale for p in model.parameters() if p.grad is not None)]

    found = gradients(random_model(), dtype)
    explicit = gradients(random_model(compute_dtype=dtype), None)
    truth = gradients(random_model().double(), None)
    assert len(found) == len(truth)
    for (name, _), a, b, c in zip(
        [("loss", None), *random_model().named_parameters()], found, explicit, truth, strict=True
    ):
        assert a.dtype == torch.float32 and torch.equal(a, b), name
        # Of three layers rounded to 8 (bfloat16) or 11 bits, relative to the gradient's norm.
        assert (a - c).norm() < (0.1 if dtype == torch.bfloat16 else 0.01) * c.norm(), name


def test_a_cache_under_autocast_and_without_gradients() -> None:
    """A cache made in the region holds its dtype; no gradient is recorded, of lm_head's weights neither."""
    model, tokens = random_model(), random_tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(2, 9)
        pieces = [model(piece, cache=cache) for piece in tokens.split([5, 4], dim=1)]
        whole = model(tokens)
    assert cache.keys.dtype == pieces[0].dtype == torch.bfloat16
    assert not any(piece.requires_grad for piece in pieces) and whole.requires_grad
    torch.testing.assert_close(torch.cat(pieces, 1), whole.detach(), rtol=0.03, atol=0.03)
    with pytest.raises(ValueError, match=r"kv_cache\[0\]\.dtype = torch\.bfloat16, x\.dtype = torch\.float32"):
        model(tokens, cache=dataclasses.replace(cache, length=0))
