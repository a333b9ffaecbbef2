"""Bitwise equality before and after a refactor: SHA-256 of what the ops return, and the losses of a training.

    PYTHONPATH=$PWD python tests/golden/test_bits.py         writes bits.json, before

Of one machine and one version of PyTorch: for the time of a refactor only.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp())
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / folder) for folder in ("kernels", "phi1"))]

import attention_cases  # noqa: E402
import calls  # noqa: E402
import cuda_block_cases  # noqa: E402
import emulator  # noqa: E402
import torch  # noqa: E402
from training import MODEL, change, losses, write  # noqa: E402

import phi1.train  # noqa: E402
from kernels import native  # noqa: E402
from phi1.config import DataConfig, LoopConfig, OptimizerConfig, TrainConfig  # noqa: E402
from phi1.tokenizer import train_tokenizer  # noqa: E402

FILE = pathlib.Path(__file__).with_name("bits.json")
ATTENTION = ("decode", "113x203", "203x113_32", "dropout_full_128", "dropout_gqa_32", "documents_unequal", "peaked")
CPU = [f"cpu/{isa.name}" for isa in native.ISAS if isa.missing is None]


def digest(tensors) -> str:
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
        found.update(str((x.dtype, tuple(x.shape))).encode())
    return found.hexdigest()[:16]


def ops() -> dict[str, str]:
    found = {}
    with emulator.as_cuda_backend(emulator.load(emulator.build())):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            for backend in ("reference", "torch", *CPU, "triton", "cuda"):
                for call in calls.CALLS:
                    if backend == "triton" and "attention, doc" in call.name:
                        continue
                    try:
                        result = digest(call.outputs_and_grads(backend, call.tensors(dtype)))
                    except ValueError as error:  # not served
                        result = str(error)
                    found[f"{call.name} {backend} {name}"] = result
            if dtype == torch.float16:
                continue
            for case in attention_cases.CASES:
                if case.name in ATTENTION:
                    for backend in (
                        "reference",
                        *CPU,
                        *(("cuda", "cuda/hopper_backward") if dtype == torch.bfloat16 else ()),
                    ):
                        if "hopper" in backend and case.head_dim == 32:
                            continue
                        found[f"attention {case.name} {backend} {name}"] = digest(
                            attention_cases.run_case(case, dtype, backend).values()
                        )
            for case in cuda_block_cases.CASES[:5]:
                for backend in ("reference", *CPU, "cuda", *(("triton",) if case.seq < 40 else ())):
                    if dtype == torch.float32 and backend in ("cuda", "triton"):
                        continue
                    tensors, options = cuda_block_cases.make_inputs(case, dtype)
                    found[f"block {case.name} {backend} {name}"] = digest(
                        cuda_block_cases.run(tensors, options, backend)
                    )
    return found


def trainings(folder: pathlib.Path) -> dict[str, list[float]]:
    """The quickstart's recipe on a model and data of seconds: 50 steps, by dropout and precision."""
    phi1.train.peak_flops = lambda device, dtype: (1e12, "assumed")
    generator = random.Random(0)
    texts = [f"def f{i % 7}(x):\n    return x + {generator.randint(0, 9)}\n" for i in range(300)]
    tokens = write(folder / "tokens", train_tokenizer(texts, 320), texts)
    base = TrainConfig(
        dataclasses.replace(MODEL, max_positions=64),
        DataConfig(tokens, sequence_length=32),
        LoopConfig(folder / "run", steps=50, sequences_per_step=8, micro_batch=8, precision="fp32", device="cpu", tune=False,
                   log_every=20, checkpoint_every=100, keep_last=1),
        OptimizerConfig(lr=3e-3, warmup_steps=30, weight_decay=0.1),
    )  # fmt: skip
    dropout = {"attention_dropout": 0.1, "residual_dropout": 0.1}
    found = {}
    for name, changes in {
        "fp32": {}, "fp32 dropout": dropout, "bf16 dropout": {**dropout, "precision": "bf16"},
        "documents": {**dropout, "document_masking": True},
    }.items():  # fmt: skip
        config = change(base, run_folder=folder / name, **changes)
        phi1.train.train(config)
        found[name] = losses(folder / name)
        assert len(found[name]) == 50
    return found


def found() -> dict[str, object]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return {"ops": ops(), "trainings": trainings(pathlib.Path(folder))}


def test_bits_are_the_same() -> None:
    before, after = json.loads(FILE.read_text()), json.loads(json.dumps(found()))
    changed = [key for key in before["ops"] if before["ops"][key] != after["ops"].get(key)]
    assert not changed, changed
    assert before == after


if __name__ == "__main__":
    FILE.write_text(json.dumps(found(), indent=1) + "\n")
