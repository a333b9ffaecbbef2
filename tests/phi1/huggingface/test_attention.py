"""`attn_implementation="phi1"`: transformers' models with our attention agree with `eager`, token for token in
generation, and what it does not serve is said in one line or handed to sdpa, by choice.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import kernels
from phi1.errors import UserError
from phi1.huggingface import attention, register_attention

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "smollm": (
        "Llama",
        {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
    "phi": ("Phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "gpt-neox": ("GPTNeoX", {"num_attention_heads": 2}),
}
# Logits are of order 1; the largest difference of all cases here is 1.2e-6, of gradients 3e-6 (measured).
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_attention()
    yield
    register_attention()


def model(architecture: str, implementation: str = "phi1", **changes: Any) -> Any:
    """A tiny random one; the same weights for every implementation."""
    name, options = ARCHITECTURES.get(architecture, (architecture, {}))
    config = getattr(transformers, f"{name}Config")(**COMMON | options | changes)
    torch.manual_seed(0)
    found = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():  # initializer_range = 0.02 would leave attention nearly uniform
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[1] ** 0.5)
    return found


def pair(architecture: str, **changes: Any) -> tuple[Any, Any]:
    return model(architecture, **changes), model(architecture, "eager", **changes)


def tokens(batch: int = 3, time: int = 29) -> Tensor:
    return torch.randint(2, 96, (batch, time), generator=torch.Generator().manual_seed(5))


PADDING = {
    "left": torch.tensor([[0] * 7 + [1] * 22, [1] * 29, [0] * 28 + [1]]),
    "right": torch.tensor([[1] * 22 + [0] * 7, [1] * 29, [1] + [0] * 28]),
    "both": torch.tensor([[0] * 4 + [1] * 22 + [0] * 3, [1] * 29, [0] + [1] * 28]),
}


def difference(ours: Any, theirs: Any, count: Tensor | None = None, **inputs: Any) -> tuple[float, float]:
    """Largest difference of logits, and of any weight's gradient relative to the largest, where `count` (batch, time)
    is 1.
    """
    gradients, logits = [], []
    for network in (ours, theirs):
        network.zero_grad()
        out = network(**inputs).logits
        out = out if count is None else out[count.bool()]
        out.square().mean().backward()
        logits.append(out.detach())
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*gradients, strict=True))
    return float((logits[0] - logits[1]).abs().max()), worst


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_and_gradients_agree_with_eager(architecture: str) -> None:
    ours, theirs = pair(architecture)
    cases: dict[str, dict[str, Any]] = {"plain": {}, "all ones": {"attention_mask": torch.ones(3, 29)}}
    cases |= {side: {"attention_mask": mask, "count": mask} for side, mask in PADDING.items()}
    for case, inputs in cases.items():
        logits, gradients = difference(ours, theirs, input_ids=tokens(), **inputs)
        assert logits < TOLERANCE and gradients < TOLERANCE, (case, logits, gradients)


def test_our_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def spy(*tensors: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return kernels.flash_attention(*tensors, **options)  # type: ignore[return-value]

    monkeypatch.setattr(attention, "flash_attention", spy)
    ours = model("llama")
    ours(tokens())
    assert [options.get("cu_seqlens_q") for options in calls] == [None, None]
    ours(tokens(), attention_mask=PADDING["left"])
    assert calls[-1]["cu_seqlens_q"].tolist()[:6] == [0, 7, 7, 29, 29, 29]
    assert calls[-1]["cu_seqlens_k"].tolist()[:6] == [0, 0, 7, 29, 29, 29]


@pytest.mark.parametrize("mistake", ["top-left", "other document", "scale"])
def test_the_tolerance_bites(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        if mistake == "scale":
            options["scale"] *= 1.001
        elif mistake == "top-left":
            return torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        elif "cu_seqlens_k" in options:
            for name in ("cu_seqlens_q", "cu_seqlens_k"):
                options[name] = torch.cat([options[name][:3], options[name][-1:]])
        return kernels.flash_attention(q, k, v, **options)

    ours, theirs = pair("llama")
    monkeypatch.setattr(attention, "flash_attention", wrong)
    mask = PADDING["left"]
    logits, gradients = difference(ours, theirs, mask, input_ids=tokens(), attention_mask=mask)
    assert logits > 10 * TOLERANCE and gradients > 10 * TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "phi", "gpt-neox", "qwen3"])
def test_packed_sequences_are_sequences_of_their_own(architecture: str) -> None:
    ours, theirs = pair(architecture)
    lengths, ids = (5, 1, 11, 12), tokens(1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    logits, gradients = difference(ours, theirs, input_ids=ids, position_ids=positions, use_cache=False)
    assert logits < TOLERANCE and gradients < TOLERANCE
    with torch.no_grad():
        apart = torch.cat([theirs(part).logits for part in ids.split(lengths, dim=1)], dim=1)
        flash = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 12, "max_length_k": 12}
        # With a cache, which models make where nothing else is said, transformers' own masks let sequences see each
        # other.
        for options in ({}, {"use_cache": False}, flash, flash | {"use_cache": False}):
            out = ours(ids, position_ids=positions, **options).logits
            assert float((out - apart).abs().max()) < TOLERANCE, options
    rows, twice = tokens(2), torch.stack([positions[0], torch.arange(29)])
    logits, gradients = difference(ours, theirs, input_ids=rows, position_ids=twice, use_cache=False)
    assert logits < TOLERANCE and gradients < TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_is_the_same_token_for_token(architecture: str, cache: str) -> None:
    ours, theirs = pair(architecture)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    prompts = tokens(3, 9)
    mask = torch.ones_like(prompts)
    mask[0, :4], mask[1, :8] = 0, 0
    for inputs in ({"input_ids": prompts}, {"input_ids": prompts, "attention_mask": mask}):
        got, expected = ours.generate(**inputs, **options), theirs.generate(**inputs, **options)
        assert got.tolist() == expected.tolist()
    one = ours.generate(prompts[:1, 4:], **options)  # without its padding
    assert one[0, -12:].tolist() == got[0, -12:].tolist()


def test_generation_in_chunks_and_with_beams() -> None:
    ours, theirs = pair("llama")
    mask = PADDING["left"][:, -12:]
    mask[:, -1] = 1
    for options in ({"prefill_chunk_size": 5}, {"num_beams": 3}):
        got, expected = (
            m.generate(tokens(3, 12), attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
            for m in (ours, theirs)
        )
        assert got.tolist() == expected.tolist(), options


def test_dropout_is_drawn_from_torch_s_generator() -> None:
    ours = model("llama", attention_dropout=0.25).train()
    plain = ours.eval()(tokens()).logits
    ours.train()

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ours(tokens()).logits

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1)) and not torch.equal(run(0), plain)
    q = torch.randn(2, 4, 9, 32, requires_grad=True)
    torch.manual_seed(3)
    got = attention._attention(q, q, q, None, dropout=0.25)
    torch.manual_seed(3)
    seed = int(torch.randint(2**63 - 1, ()))
    x = q.transpose(1, 2)
    expected = kernels.flash_attention(x, x, x, dropout_p=0.25, dropout_seed=seed, backend="reference")
    assert torch.allclose(got, expected, atol=1e-6)  # type: ignore[arg-type]
    (wanted,) = torch.autograd.grad(ours(tokens()).logits.sum(), [ours.lm_head.weight])
    assert wanted.isfinite().all()


def test_activation_checkpointing_draws_the_same_masks_again() -> None:
    ours = model("llama", attention_dropout=0.25).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            ours.gradient_checkpointing_enable()
        ours.zero_grad()
        torch.manual_seed(0)
        ours(tokens(), use_cache=False, labels=tokens()).loss.backward()
        gradients.append(ours.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_folder_is_loaded_with_it(tmp_path: Any) -> None:
    theirs = model("llama", "eager")
    theirs.save_pretrained(tmp_path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="phi1")
    assert ours.config._attn_implementation == "phi1"
    assert difference(ours, theirs, input_ids=tokens())[0] < TOLERANCE
    theirs.set_attn_implementation("phi1")
    assert torch.equal(theirs(tokens()).logits, ours(tokens()).logits)


def bidirectional(**changes: Any) -> Any:
    found = model("llama", **changes)
    found.config.is_causal = False
    for layer in found.model.layers:  # transformers 4
        layer.self_attn.is_causal = False
    return found


OUTSIDE = {
    "window": (lambda **o: model("Mistral", sliding_window=8, num_key_value_heads=2, **o), {}, "sliding_window .*8"),
    "not causal": (lambda **o: bidirectional(**o), {}, "not causal"),
    "hole": (
        lambda **o: model("llama", **o),
        {"attention_mask": torch.tensor([[1] * 5 + [0] * 5 + [1] * 19] * 3)},
        "attention_mask has a hole in row 0",
    ),
    "own mask": (
        lambda **o: model("llama", **o),
        {"attention_mask": torch.ones(3, 1, 29, 29, dtype=torch.bool).tril()},
        r"a mask of the caller's own, \(3, 1, 29, 29\)",
    ),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_is_not_served_is_an_error_or_sdpa_s_by_choice(case: str) -> None:
    make, inputs, message = OUTSIDE[case]
    with pytest.raises(UserError, match=f"attn_implementation='phi1': .*{message}.*unsupported='sdpa'") as caught:
        make()(tokens(), **inputs)
    assert "\n" not in str(caught.value)
    register_attention(unsupported="sdpa")
    ours, theirs = make(), make(implementation="sdpa")
    count = inputs.get("attention_mask", torch.ones(3, 29))
    count = count if count.dim() == 2 else None
    logits, gradients = difference(ours, theirs, count, input_ids=tokens(), **inputs)
    assert logits < TOLERANCE and gradients < TOLERANCE


def test_a_window_that_holds_the_sequence_is_served() -> None:
    ours, theirs = pair("Mistral", sliding_window=29, num_key_value_heads=2)
    assert difference(ours, theirs, input_ids=tokens())[0] < TOLERANCE
    with pytest.raises(UserError, match=r"sliding_window .*29, shorter than the 30 keys"):
        ours.generate(tokens(), max_new_tokens=3)
    register_attention(unsupported="sdpa")  # from there on
    options: dict[str, Any] = {"attention_mask": PADDING["left"], "max_new_tokens": 6, "do_sample": False}
    assert ours.generate(tokens(), **options).tolist() == theirs.generate(tokens(), **options).tolist()


@pytest.mark.parametrize("choice", ["error", "sdpa"])
def test_what_sdpa_lacks_too_is_always_an_error(choice: Any) -> None:
    register_attention(unsupported=choice)
    gemma = model("Gemma2", num_key_value_heads=2, head_dim=16, sliding_window=64)
    with pytest.raises(UserError, match=r"softcap = 50.0: .*'eager'"):
        gemma(tokens())
    with pytest.raises(UserError, match=r"output_attentions = True: .*'eager'"):
        model("llama")(tokens(), output_attentions=True)
    x = torch.randn(1, 2, 3, 32)
    with pytest.raises(UserError, match=r"attention sinks: .*'eager'"):
        transformers.AttentionInterface()["phi1"](gemma, x, x, x, None, s_aux=torch.zeros(2))


@pytest.mark.parametrize("unsupported", ["error", "sdpa"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CodeGen", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 96, "n_positions": 128, "rotary_dim": 8}),
        ("Bloom", {"n_head": 4, "n_layer": 2}),
        ("GPTNeoXJapanese", {}),
    ],
)
def test_models_with_attention_of_their_own(name, options, unsupported):
    """They would add None to the scores, and so look ahead, where we mean causal by it."""
    register_attention(unsupported=unsupported)
    config = getattr(transformers, f"{name}Config")(**COMMON | options)
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="phi1")
    with pytest.raises(UserError, match=r"computes attention in its own code.*'eager'"):
        network(torch.tensor([[1, 2, 3]]))


def test_a_wrong_choice_is_named() -> None:
    with pytest.raises(UserError, match=r"unsupported = 'eager': must be 'error' or 'sdpa'"):
        register_attention(unsupported="eager")  # type: ignore[arg-type]


def test_torch_compile() -> None:
    ours, theirs = pair("llama", num_hidden_layers=1)
    compiled, mask = torch.compile(ours, backend="eager"), PADDING["left"]
    logits, gradients = difference(compiled, theirs, mask, input_ids=tokens(), attention_mask=mask, use_cache=False)
    assert logits < TOLERANCE and gradients < TOLERANCE


def test_scaled_dot_product_attention_in_three_lines() -> None:
    # README: our attention in the layout of F.scaled_dot_product_attention, (batch, heads, time, head_dim).
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return kernels.flash_attention(q, k, v, causal=True).transpose(1, 2)  # type: ignore[union-attr]

    q, k, v = (torch.randn(2, heads, 33, 64, requires_grad=True) for heads in (4, 2, 2))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours, grad = attention(q, k, v), torch.randn(theirs.shape)
    assert torch.allclose(ours, theirs, atol=1e-5)
    got, expected = (torch.autograd.grad(out, (q, k, v), grad) for out in (ours, theirs))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))
