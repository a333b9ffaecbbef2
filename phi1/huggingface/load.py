"""Read Hugging Face folders: `PhiForCausalLM`, Microsoft's first phi layout and CodeGen.

Hugging Face keeps the query, key, value and MLP projections apart; here they are rows of one matrix (phi1/model.py),
so they are joined. Only the wiring differs between the three layouts that can be read:

    phi        transformers' PhiForCausalLM: q_proj, k_proj, v_proj, dense, fc1, fc2
    phi-msft   Microsoft's first checkpoints: mixer.Wqkv holds q, k, v
    codegen    CodeGenForCausalLM: qkv_proj in four groups of [q | v | k], interleaved rotary, no attention biases
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, get_args

import safetensors
import torch
from torch import Tensor

from phi1.config import Activation, ModelConfig
from phi1.errors import UserError
from phi1.model import Phi1
from phi1.tokenizer import Tokenizer, codegen_tokenizer

Linear = tuple[Tensor, Tensor]
"""Weight (rows, columns) and bias (rows,); or a LayerNorm's weight and bias."""


def import_folder(folder: pathlib.Path | str) -> Phi1:
    """The model in a Hugging Face folder (safetensors, or pytorch_model.bin), in evaluation mode, on the CPU.

    Parameters keep the type they were written in. Raises UserError for a folder of another architecture, an
    option that `Phi1` does not have, a tensor that is missing, left over or of another shape, a corrupt file.
    """
    folder = pathlib.Path(folder)
    raw = _read_json(folder / "config.json", "name a Hugging Face model folder")
    layout = _LAYOUTS.get(raw.get("model_type", ""))
    if layout is None:
        raise UserError(
            f"{folder / 'config.json'}: model_type = {raw.get('model_type')!r}: "
            f"cannot be read as phi-1; must be one of {', '.join(_LAYOUTS)}"
        )
    try:
        config = layout.shape(raw)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{folder / 'config.json'}: incomplete or broken ({type(error).__name__}: {error})") from error
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    weights = _Weights(folder)
    state = {"embedding": weights.read(layout.embedding + ".weight", config.vocab_size, config.hidden_size)}
    state["norm_weight"], state["norm_bias"] = weights.norm(layout.final_norm, config.hidden_size)
    state["head_weight"], state["head_bias"] = weights.linear(layout.head, config.vocab_size, config.hidden_size)
    for i in range(config.num_layers):
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in layout.layer(weights, i, config).items()}
    weights.require_all_read()
    with torch.device("meta"):
        model = Phi1(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def import_tokenizer(folder: pathlib.Path | str) -> Tokenizer:
    """The tokenizer in a Hugging Face folder: its tokenizer.json, else codegen's over its vocab.json and merges.txt.

    folder: may also be a tokenizer.json itself.
    Raises UserError if neither is there or they are not what they should be.
    """
    folder = pathlib.Path(folder)
    if folder.is_file() or (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder)
    if (folder / "vocab.json").exists():
        return codegen_tokenizer(folder)
    raise UserError(f"{folder}: has neither tokenizer.json nor vocab.json and merges.txt; name a tokenizer")


class _Weights:
    """The tensors of a folder by name, read when asked for."""

    _BUFFERS = (".causal_mask", ".masked_bias", ".inv_freq", ".attn.bias", ".embed_positions")  # not parameters

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._read: dict[str, Callable[[], Tensor]] = {}
        for file in self._files():
            try:
                if file.suffix == ".safetensors":
                    opened = safetensors.safe_open(file, framework="pt")
                    self._read |= {name: lambda f=opened, n=name: f.get_tensor(n) for name in opened.keys()}  # noqa: SIM118
                else:
                    loaded = torch.load(file, map_location="cpu", weights_only=True)
                    self._read |= {name: lambda t=tensor: t for name, tensor in loaded.items()}
            except Exception as error:  # each library has its own, up to pickle's
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"{file}: missing or corrupt ({reason}); fetch it again") from error
        self._left = {name for name in self._read if not name.endswith(self._BUFFERS)}

    def _files(self) -> list[pathlib.Path]:
        for whole in ("model.safetensors", "pytorch_model.bin"):
            index = self._folder / f"{whole}.index.json"
            if (self._folder / whole).exists():
                return [self._folder / whole]
            if index.exists():
                weight_map = _read_json(index, "fetch it again").get("weight_map")
                if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                    raise UserError(f"{index}: its weight_map names no file for each tensor; fetch it again")
                return [self._folder / name for name in sorted(set(weight_map.values()))]
        raise UserError(f"{self._folder}: holds no weights (model.safetensors or pytorch_model.bin, or their index)")

    def read(self, name: str, *shape: int) -> Tensor:
        if name not in self._read:
            raise UserError(f"{self._folder}: tensor {name} is missing; the folder is not what its config.json says")
        tensor = self._read[name]()
        if not isinstance(tensor, Tensor):
            raise UserError(f"{self._folder}: {name} is a {type(tensor).__name__}, no tensor; fetch the folder again")
        if tuple(tensor.shape) != shape:
            raise UserError(f"{self._folder}: {name} has shape {tuple(tensor.shape)}, its config.json means {shape}")
        self._left.discard(name)
        return tensor

    def linear(self, name: str, rows: int, columns: int) -> Linear:
        return self.read(f"{name}.weight", rows, columns), self.read(f"{name}.bias", rows)

    def norm(self, name: str, width: int) -> Linear:
        return self.read(f"{name}.weight", width), self.read(f"{name}.bias", width)

    def require_all_read(self) -> None:
        if self._left:
            raise UserError(
                f"{self._folder}: {len(self._left)} tensors that its config.json does not mean, "
                f"{min(self._left)} among them; the folder is of another model"
            )


def _fused(norm: Linear, q: Linear, k: Linear, v: Linear, fc1: Linear, dense: Linear, fc2: Linear) -> dict[str, Tensor]:
    """A block's parameters (phi1/model.py) from its parts."""
    inner = (q, k, v, fc1)
    return {
        "norm_weight": norm[0],
        "norm_bias": norm[1],
        "w_in": torch.cat([weight for weight, _ in inner]),
        "b_in": torch.cat([bias for _, bias in inner]),
        "w_out": torch.cat([dense[0], fc2[0]], dim=1),
        "b_attention": dense[1],
        "b_mlp": fc2[1],
    }


def _phi_layer(weights: _Weights, i: int, config: ModelConfig) -> dict[str, Tensor]:
    name, hidden, width, kv_width = f"model.layers.{i}", config.hidden_size, config.attention_width, config.kv_width
    return _fused(
        norm=weights.norm(f"{name}.input_layernorm", hidden),
        q=weights.linear(f"{name}.self_attn.q_proj", width, hidden),
        k=weights.linear(f"{name}.self_attn.k_proj", kv_width, hidden),
        v=weights.linear(f"{name}.self_attn.v_proj", kv_width, hidden),
        fc1=weights.linear(f"{name}.mlp.fc1", config.intermediate_size, hidden),
        dense=weights.linear(f"{name}.self_attn.dense", hidden, width),
        fc2=weights.linear(f"{name}.mlp.fc2", hidden, config.intermediate_size),
    )


def _phi_msft_layer(weights: _Weights, i: int, config: ModelConfig) -> dict[str, Tensor]:
    name, hidden, rows = f"transformer.h.{i}", config.hidden_size, [config.attention_width] + 2 * [config.kv_width]
    weight, bias = weights.linear(f"{name}.mixer.Wqkv", sum(rows), hidden)
    q, k, v = zip(weight.split(rows), bias.split(rows), strict=True)
    return _fused(
        norm=weights.norm(f"{name}.ln", hidden),
        q=q,
        k=k,
        v=v,
        fc1=weights.linear(f"{name}.mlp.fc1", config.intermediate_size, hidden),
        dense=weights.linear(f"{name}.mixer.out_proj", hidden, config.attention_width),
        fc2=weights.linear(f"{name}.mlp.fc2", hidden, config.intermediate_size),
    )


def _codegen_layer(weights: _Weights, i: int, config: ModelConfig) -> dict[str, Tensor]:
    name, hidden = f"transformer.h.{i}", config.hidden_size
    # Trained on four TPU cores: each holds [q | v | k] of a quarter of the heads (transformers' CodeGenAttention).
    qkv = weights.read(f"{name}.attn.qkv_proj.weight", 3 * hidden, hidden)
    q, v, k = (part.reshape(hidden, hidden) for part in qkv.view(4, 3, hidden // 4, hidden).unbind(1))
    no_bias = qkv.new_zeros(hidden)
    return _fused(
        norm=weights.norm(f"{name}.ln_1", hidden),
        q=(_halves(q, config), no_bias),
        k=(_halves(k, config), no_bias),
        v=(v, no_bias),
        fc1=weights.linear(f"{name}.mlp.fc_in", config.intermediate_size, hidden),
        dense=(weights.read(f"{name}.attn.out_proj.weight", hidden, hidden), no_bias.clone()),
        fc2=weights.linear(f"{name}.mlp.fc_out", hidden, config.intermediate_size),
    )


def _halves(weight: Tensor, config: ModelConfig) -> Tensor:
    """Reorders a q or k projection's rows: rotary pairs (2i, 2i + 1) of each head become (i, i + rotary_dim / 2).

    q and k are permuted alike, so that every product q · k stays what it was.
    """
    order = torch.arange(config.head_dim)
    order[: config.rotary_dim] = torch.arange(config.rotary_dim).view(-1, 2).T.flatten()
    return weight.view(config.num_heads, config.head_dim, -1)[:, order].reshape(weight.shape)


def _phi_shape(raw: dict[str, Any]) -> ModelConfig:
    rope = raw | (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _require(rope_type == "default", "rope_type", rope_type, "default")
    _require(not raw.get("qk_layernorm"), "qk_layernorm", raw.get("qk_layernorm"), False)
    _require(not raw.get("tie_word_embeddings"), "tie_word_embeddings", raw.get("tie_word_embeddings"), False)
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=head_dim,
        rotary_dim=int(head_dim * rope.get("partial_rotary_factor", 0.5)),  # PhiConfig's default
        rotary_base=rope.get("rope_theta", 10000.0),
        max_positions=raw["max_position_embeddings"],
        layer_norm_eps=raw.get("layer_norm_eps", 1e-5),
        initializer_range=raw.get("initializer_range", 0.02),
        attention_dropout=raw.get("attention_dropout") or 0.0,
        residual_dropout=raw.get("resid_pdrop", 0.0),
        activation=_activation(raw.get("hidden_act", "gelu_new")),
    )


def _gpt_shape(raw: dict[str, Any]) -> ModelConfig:
    """The shape in a config.json with GPT-2's names, as CodeGen and Microsoft's first phi have it."""
    _require(not raw.get("tie_word_embeddings"), "tie_word_embeddings", raw.get("tie_word_embeddings"), False)
    if raw["model_type"] == "codegen":
        _require(raw["n_head"] % 4 == 0, "n_head", raw["n_head"], "a multiple of 4")
        _require(raw["n_embd"] % raw["n_head"] == 0, "n_embd", raw["n_embd"], f"a multiple of {raw['n_head']}")
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["n_embd"],
        intermediate_size=raw.get("n_inner") or 4 * raw["n_embd"],
        num_layers=raw["n_layer"],
        num_heads=raw["n_head"],
        num_kv_heads=raw.get("n_head_kv") or raw["n_head"],
        head_dim=raw["n_embd"] // raw["n_head"],
        rotary_dim=raw["rotary_dim"],
        max_positions=raw["n_positions"],
        layer_norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        initializer_range=raw.get("initializer_range", 0.02),
        attention_dropout=raw.get("attn_pdrop", 0.0),
        residual_dropout=raw.get("resid_pdrop", 0.0),
        activation=_activation(raw.get("activation_function", "gelu_new")),
    )


def _require(fits: bool, key: str, value: object, must_be: object) -> None:
    if not fits:
        raise UserError(f"{key} = {value!r}: Phi1 cannot represent it; must be {must_be}")


def _activation(name: str) -> Activation:
    """Ours of one of transformers; the tanh form of GELU has three names there."""
    found: dict[str, Activation] = {x: x for x in get_args(Activation)}
    found |= {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}
    _require(name in found, "activation", name, f"one of {', '.join(found)}")
    return found[name]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where an architecture keeps what `Phi1` needs."""

    shape: Callable[[dict[str, Any]], ModelConfig]
    layer: Callable[[_Weights, int, ModelConfig], dict[str, Tensor]]
    embedding: str
    final_norm: str
    head: str


_LAYOUTS = {
    "phi": _Layout(_phi_shape, _phi_layer, "model.embed_tokens", "model.final_layernorm", "lm_head"),
    "phi-msft": _Layout(_gpt_shape, _phi_msft_layer, "transformer.embd.wte", "lm_head.ln", "lm_head.linear"),
    "codegen": _Layout(_gpt_shape, _codegen_layer, "transformer.wte", "transformer.ln_f", "lm_head"),
}


def _read_json(path: pathlib.Path, way_out: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or broken ({error}); {way_out}") from error
