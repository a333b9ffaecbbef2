"""Hugging Face folders: logits agree with transformers in both directions, and what is wrong is said in one line."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import phi1
from phi1.config import PRESETS, ModelConfig
from phi1.errors import UserError
from phi1.huggingface import export_folder, import_folder, import_tokenizer, phi_config, to_phi
from phi1.model import Phi1
from phi1.tokenizer import Tokenizer, train_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[3]
VOCABULARY = 320
BASE = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    rotary_dim=8,
    max_positions=256,
)
SHAPES = {
    "multi-head": BASE,
    "grouped": dataclasses.replace(BASE, num_kv_heads=2),
    "multi-query": dataclasses.replace(BASE, num_kv_heads=1),
    "16x32-on-1024": dataclasses.replace(
        BASE, hidden_size=1024, num_heads=16, num_kv_heads=16, head_dim=32, rotary_dim=16, num_layers=1
    ),
    "relu2": dataclasses.replace(BASE, activation="relu2"),
    # In floating point 44 * (30 / 44) is below 30.
    "odd-rotary": dataclasses.replace(BASE, head_dim=44, rotary_dim=30, rotary_base=500.0, layer_norm_eps=1e-3),
}
# Logits are of order 1; transformers' fp32 results differ from ours by at most 2e-6 (measured on these shapes).
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def f(x):\n    return x + 1\n"] * 4, 300)


def randomise(parameters: "dict[str, Tensor]", seed: int) -> None:
    """Every weight random, biases and LayerNorms too; matrices scaled so that logits stay of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise * 0.7 / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + name.endswith("weight"))


def random_model(config: ModelConfig, seed: int = 0) -> Phi1:
    model = Phi1(config).eval()
    randomise(dict(model.named_parameters()), seed)
    return model


def tokens(vocab_size: int = VOCABULARY, time: int = 64) -> Tensor:
    return torch.randint(vocab_size, (2, time), generator=torch.Generator().manual_seed(5))


def difference(ours: Phi1, theirs: Any, time: int = 64) -> float:
    with torch.no_grad():
        return (ours(tokens(time=time)) - theirs(tokens(time=time)).logits).abs().max().item()


def phi_in_transformers(config: ModelConfig) -> Any:
    return transformers.PhiForCausalLM(
        transformers.PhiConfig(**phi_config(config, torch.float32), bos_token_id=0, eos_token_id=0)
    ).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_export_agrees_with_transformers(shape: str, tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    model = random_model(SHAPES[shape])
    export_folder(tmp_path / "hf", model, tokenizer)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(theirs).__name__ == "PhiForCausalLM" and theirs.dtype == torch.float32
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert difference(model, theirs.eval()) < TOLERANCE
    assert difference(model, theirs, time=256) < TOLERANCE
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eot_id
    back = import_folder(tmp_path / "hf")
    assert back.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("shape", SHAPES)
def test_import_agrees_with_transformers(shape: str, tmp_path: pathlib.Path) -> None:
    theirs = phi_in_transformers(SHAPES[shape])
    randomise(dict(theirs.named_parameters()), seed=1)
    theirs.save_pretrained(tmp_path / "hf")
    ours = import_folder(tmp_path / "hf")
    assert ours.config == SHAPES[shape]
    assert difference(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("mistake", ["swapped k and v", "interleaved rotary", "lost bias", "other rotary base", "erf"])
def test_the_tolerance_bites(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, theirs = random_model(BASE), phi_in_transformers(BASE)
    state = dict(to_phi(model.state_dict(), BASE))
    theirs.load_state_dict(state)
    assert difference(model, theirs) < TOLERANCE
    layer = theirs.model.layers[1]
    with torch.no_grad():
        if mistake == "swapped k and v":
            layer.self_attn.k_proj, layer.self_attn.v_proj = layer.self_attn.v_proj, layer.self_attn.k_proj
        elif mistake == "interleaved rotary":
            order = torch.arange(64).view(4, 16)
            order[:, :8] = order[:, :8].reshape(4, 2, 4).transpose(1, 2).reshape(4, 8)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.copy_(projection.weight[order.flatten()])
        elif mistake == "lost bias":
            layer.mlp.fc2.bias.zero_()
        elif mistake == "other rotary base":
            theirs.model.rotary_emb.inv_freq.mul_(1.001)
        else:
            layer.mlp.activation_fn = torch.nn.GELU()
    assert difference(model, theirs) > 10 * TOLERANCE


def codegen_in_transformers() -> Any:
    config = transformers.CodeGenConfig(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_ctx=128,
        n_embd=128,
        n_layer=2,
        n_head=8,
        rotary_dim=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = transformers.CodeGenForCausalLM(config).eval()
    randomise(dict(theirs.named_parameters()), seed=2)
    return theirs


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_codegen_agrees_with_transformers(file: str, tmp_path: pathlib.Path) -> None:
    theirs = codegen_in_transformers()
    theirs.save_pretrained(tmp_path)
    if file == "pytorch_model.bin":  # as Salesforce published it, with the causal masks among the tensors
        (tmp_path / "model.safetensors").unlink()
        masks = {f"transformer.h.{i}.attn.causal_mask": torch.ones(1, 1, 128, 128, dtype=torch.uint8) for i in (0, 1)}
        torch.save(theirs.state_dict() | masks, tmp_path / file)
    ours = import_folder(tmp_path)
    assert ours.config.rotary_dim == 8 and ours.config.head_dim == 16 and ours.config.intermediate_size == 512
    assert difference(ours, theirs) < TOLERANCE


def test_phi_msft_layout(tmp_path: pathlib.Path) -> None:
    model = random_model(BASE)
    phi = to_phi(model.state_dict(), BASE)
    state = {"transformer.embd.wte.weight": phi["model.embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        state[f"lm_head.ln.{kind}"] = phi[f"model.final_layernorm.{kind}"]
        state[f"lm_head.linear.{kind}"] = phi[f"lm_head.{kind}"]
        for i in range(2):
            theirs, ours = f"transformer.h.{i}", f"model.layers.{i}"
            qkv = [phi[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{theirs}.mixer.Wqkv.{kind}"] = torch.cat(qkv)
            state[f"{theirs}.mixer.out_proj.{kind}"] = phi[f"{ours}.self_attn.dense.{kind}"]
            state[f"{theirs}.ln.{kind}"] = phi[f"{ours}.input_layernorm.{kind}"]
            for part in ("fc1", "fc2"):
                state[f"{theirs}.mlp.{part}.{kind}"] = phi[f"{ours}.mlp.{part}.{kind}"]
    safetensors.torch.save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "model.safetensors")
    config = {
        "model_type": "phi-msft",
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_inner": 96,
        "n_layer": 2,
        "n_head": 4,
        "n_head_kv": None,
        "rotary_dim": 8,
        "n_positions": 256,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = import_folder(tmp_path)
    assert back.config == BASE
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(("preset", "count"), [("phi1", 341), ("phi1-small", 285)])
def test_names_and_shapes_are_transformers(preset: str, count: int) -> None:
    with torch.device("meta"):
        ours, theirs = Phi1(PRESETS[preset]), phi_in_transformers(PRESETS[preset])
    shapes = {name: tensor.shape for name, tensor in to_phi(ours.state_dict(), ours.config).items()}
    assert len(shapes) == count
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}


def test_config_serves_transformers_4_and_5() -> None:
    config = phi_config(PRESETS["phi1"], torch.float16)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["attention_dropout"] == config["resid_pdrop"] == config["embd_pdrop"] == 0.0


def test_shards_type_and_compiled_prefix(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    model = random_model(BASE)
    compiled = torch.compile(model)
    compiled.blocks[0] = torch.compile(compiled.blocks[0])
    assert any("_orig_mod." in name for name in compiled.state_dict())
    export_folder(tmp_path / "hf", compiled, tokenizer, dtype=torch.bfloat16, max_shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "hf" / name).stat().st_size < 110_000 for name in files)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert not any("_orig_mod" in name for name in index["weight_map"])
    assert index["metadata"]["total_size"] == 2 * sum(parameter.numel() for parameter in model.parameters())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    back = import_folder(tmp_path / "hf")
    assert torch.equal(back.blocks[1].w_out, model.blocks[1].w_out.to(torch.bfloat16))


def test_exported_tokenizer_gives_the_same_ids(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    export_folder(tmp_path / "hf", random_model(BASE), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def f(x):\n\n        return  x + 12\n\t\té"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert set(theirs(text)) == {"input_ids", "attention_mask"}
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.eot_id and theirs.padding_side == "left"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation.eos_token_id == generation.pad_token_id == tokenizer.eot_id
    assert theirs.model_max_length == 256
    assert import_tokenizer(tmp_path / "hf").hash == tokenizer.hash


def test_a_folder_that_transformers_saved_anew_has_our_tokenizer(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    """It adds a post-processor, so that the file has another hash; a token more is another tokenizer."""
    export_folder(tmp_path / "hf", random_model(BASE), tokenizer)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    again = import_tokenizer(tmp_path / "again")
    assert again.hash != tokenizer.hash
    assert again.same_ids(tokenizer) and tokenizer.same_ids(again)
    assert not again.same_ids(tokenizer.with_fim())


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        change(state)
        safetensors.torch.save_file(state, folder / "model.safetensors")

    return apply


def _config(**changes: object) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config |= changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    return apply


def _truncate(folder: pathlib.Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])


DAMAGE: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "missing tensor": (
        _tensors(lambda state: state.pop("model.layers.1.mlp.fc2.bias")),
        r"tensor model\.layers\.1\.mlp\.fc2\.bias is missing",
    ),
    "wrong shape": (
        _tensors(lambda state: state.update({"lm_head.bias": torch.zeros(7)})),
        r"lm_head\.bias has shape \(7,\), its config\.json means \(320,\)",
    ),
    "left over": (
        _tensors(lambda state: state.update({"model.layers.2.mlp.fc2.bias": torch.zeros(7)})),
        r"1 tensors that its config\.json does not mean, model\.layers\.2\.mlp\.fc2\.bias",
    ),
    "other architecture": (_config(model_type="llama"), r"model_type = 'llama': .*one of phi, phi-msft, codegen"),
    "qk norm": (_config(qk_layernorm=True), r"qk_layernorm = True: Phi1 cannot represent it"),
    "other activation": (_config(hidden_act="relu"), r"activation = 'relu'"),
    "scaled rotary": (
        _config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        r"rope_type = 'yarn'",
    ),
    "incomplete config": (_config(num_hidden_layers="absent"), r"config\.json: incomplete .*num_hidden_layers"),
    "broken shape": (_config(num_key_value_heads=3), r"config\.json: model\.num_kv_heads = 3: must divide"),
    "no heads": (
        _config(num_attention_heads=0, head_dim="absent"),
        r"config\.json: incomplete or broken \(ZeroDivision",
    ),
    "heads that are no integer": (
        _config(num_attention_heads=4.0),
        r"config\.json: model\.num_heads = 4\.0: must be an i",
    ),
    "no epsilon": (
        _config(layer_norm_eps=None),
        r"config\.json: model\.layer_norm_eps = None: must be a finite number",
    ),
    "no rotary base": (
        _config(rope_theta=None, rope_parameters=None),
        r"config\.json: model\.rotary_base = None: must be a finite number",
    ),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: missing or broken"),
    "no folder": (lambda folder: (folder / "config.json").unlink(), r"config\.json: missing .*name a Hugging Face"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"holds no weights"),
    "truncated": (_truncate, r"model\.safetensors: missing or corrupt"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line(damage: str, tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    export_folder(tmp_path / "hf", random_model(BASE), tokenizer)
    apply, message = DAMAGE[damage]
    apply(tmp_path / "hf")
    with pytest.raises(UserError, match=message) as caught:
        import_folder(tmp_path / "hf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."])
def test_a_broken_or_hostile_pickle_is_refused_in_one_line(content: bytes, tmp_path: pathlib.Path) -> None:
    codegen_in_transformers().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: missing or corrupt") as caught:
        import_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight_map", [["a"], {"lm_head.bias": 3}, None])
def test_an_index_that_names_no_files(weight_map: object, tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    export_folder(tmp_path / "hf", random_model(BASE), tokenizer, max_shard_bytes=100_000)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json: its weight_map names no file for each tensor; fetch it again"):
        import_folder(tmp_path / "hf")


def test_a_pickle_with_something_else_in_a_tensors_place(tmp_path: pathlib.Path) -> None:
    theirs = codegen_in_transformers()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict() | {"lm_head.bias": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"lm_head\.bias is a int, no tensor; fetch the folder again"):
        import_folder(tmp_path)


def test_missing_shard_is_named(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    export_folder(tmp_path / "hf", random_model(BASE), tokenizer, max_shard_bytes=100_000)
    next((tmp_path / "hf").glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-.*: missing or corrupt"):
        import_folder(tmp_path / "hf")


def test_codegen_with_another_number_of_heads_is_refused(tmp_path: pathlib.Path) -> None:
    codegen_in_transformers().save_pretrained(tmp_path)
    _config(n_head=2)(tmp_path)
    with pytest.raises(UserError, match=r"n_head = 2: .*a multiple of 4"):
        import_folder(tmp_path)


def test_export_refuses_what_it_would_spoil(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="already exists"):
        export_folder(tmp_path, random_model(BASE), tokenizer)
    small = dataclasses.replace(BASE, vocab_size=299)
    with pytest.raises(UserError, match="tokenizer has 300 entries, the model 299 rows"):
        export_folder(tmp_path / "hf", random_model(small), tokenizer)
    assert not (tmp_path / "hf").exists()


def test_folder_without_tokenizer_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.json"):
        import_tokenizer(tmp_path)


def test_our_version_is_none_that_transformers_takes_for_its_package_kernels() -> None:
    from packaging.version import parse
    from transformers.utils import import_utils

    ours = parse(phi1.__version__)
    for low, high in (
        (import_utils.KERNELS_MIN_VERSION, import_utils.KERNELS_MAX_VERSION),
        ("0.18.2", "0.19.0"),  # of transformers 5.23
    ):
        assert not parse(low) <= ours < parse(high), "transformers would import its names from our package kernels"


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "PYTHONPATH only"])
def test_transformers_is_not_misled_by_our_package_kernels(installed: bool, tmp_path: pathlib.Path) -> None:
    # transformers looks for an unrelated package of that name, and would use ours if its version were in range.
    if installed:
        information = tmp_path / "phi1-0.1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: phi1\nVersion: 0.1.0\n")
        (information / "top_level.txt").write_text("data_tools\nkernels\nphi1\n")
    program = (
        "import transformers.utils, torch\n"
        "from transformers import PhiConfig, PhiForCausalLM\n"
        "assert not transformers.utils.is_kernels_available()\n"
        "config = PhiConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,\n"
        "                   num_attention_heads=2)\n"
        "print(PhiForCausalLM(config)(torch.zeros(1, 2, dtype=torch.int64)).logits.shape)\n"
        "import kernels, phi1\nprint(kernels.__file__)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch.Size([1, 2, 8])", str(ROOT / "kernels" / "__init__.py")]
