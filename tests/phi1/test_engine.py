"""How processes share the model: DDP and FSDP2 train the same, and go on from one another's checkpoints."""

import shutil

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from training import DROPOUT, MODEL, TINY, change, content, processes, records, same_run, write_recipe

from phi1 import checkpoint
from phi1.engine import Engine
from phi1.model import Phi1
from phi1.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


def run_in(tmp_path, config, size, run, data_parallel):
    """Trains in `size` processes; each one's output."""
    config = change(config, run_folder=run, data_parallel=data_parallel)
    found = processes(tmp_path, *[[write_recipe(tmp_path, config)]] * size)
    assert [status for status, _ in found] == [0] * size, found
    return [said for _, said in found]


def test_shards_train_as_wholes_do(config, tmp_path, masked_tokens):
    """FSDP2 on 4 processes, and from DDP to FSDP2 and back to DDP on 2, 3 and 2: as one process that was not stopped.
    Dropout included, masks and micro-batches uneven, parameters whose rows the processes do not divide, an evaluation
    in which some have no sequence. On the same number of processes a run that goes on gives the same bits.
    """
    config = change(
        config,
        steps=6,
        sequences_per_step=9,
        micro_batch=2,
        tokens=masked_tokens,
        validation_tokens=masked_tokens,
        evaluation_sequences=5,
        checkpoint_every=2,
        **DROPOUT,
    )
    train(config)
    said = run_in(tmp_path, config, 4, tmp_path / "4", "fsdp2")
    assert [text.count("step 6/6") for text in said] == [1, 0, 0, 0]
    same_run(config.train.run_folder, tmp_path / "4")

    run, kept = tmp_path / "run-2-3-2", tmp_path / "kept"
    run_in(tmp_path, config, 2, run, "ddp")
    for step in (4, 6):
        shutil.rmtree(run / f"step-00000{step}")
    said = run_in(tmp_path, config, 3, run, "fsdp2")
    assert "changed since then: train.data_parallel = ddp -> fsdp2" in said[0]
    (run / "step-000006").rename(kept)
    run_in(tmp_path, config, 3, run, "fsdp2")
    assert content(run / "step-000006") == content(kept)
    shutil.rmtree(run / "step-000006")
    run_in(tmp_path, config, 2, run, "ddp")
    same_run(config.train.run_folder, run)
    facts = [checkpoint.read_facts(run / f"step-00000{step}")["recipe"]["train"] for step in (2, 4, 6)]
    assert [fact["data_parallel"] for fact in facts] == ["ddp", "fsdp2", "ddp"]


@pytest.mark.parametrize(("precision", "data_parallel"), [("bf16", "ddp"), ("bf16", "fsdp2"), ("fp16", "fsdp2")])
def test_lower_precision(config, tmp_path, precision, data_parallel):
    """The same casts, of two micro-batches: a loss that differs by more than the order of float32 sums would show. In
    fp16 all processes see an overflow that one has, and skip the same steps.
    """
    config = change(
        config,
        precision=precision,
        loss_scale=2.0**26,
        steps=4,
        # With Adam's 1e-7 the order of sums moves weights by 1e-6, and one between two bf16 is now and then cast to the
        # other: 1.2e-5 of a norm, in one of 15 runs (five seeds). With this in none.
        eps=1e-3,
        validation_tokens=config.data.tokens,
        **TINY | {"sequences_per_step": 8},
        **DROPOUT,
    )
    train(config)
    run_in(tmp_path, config, 2, tmp_path / "shards", data_parallel)
    skipped = [
        [record.get("skipped") for record in records(run)] for run in (config.train.run_folder, tmp_path / "shards")
    ]
    assert skipped[0] == skipped[1] and any(skipped[0]) == (precision == "fp16")
    same_run(config.train.run_folder, tmp_path / "shards")


def test_what_is_exchanged_when(config, fake_world):
    """A block's weights once for each pass, gradients in the last micro-batch only; nothing is whole between steps."""
    engine = Engine(model := Phi1(MODEL, torch.float32), fake_world(4), change(config, data_parallel="fsdp2").train)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert sum(parameter.to_local().numel() for parameter in model.parameters()) * 4 == 37_824
    tokens, counts = torch.zeros(1, 8, dtype=torch.long), []
    for exchange in (False, False, True):
        with CommDebugMode() as comm, engine.exchanging(exchange):
            engine.network(tokens, targets=tokens).backward()
        counts.append({str(op).split(".")[-1]: count for op, count in comm.get_comm_counts().items()})
    gathers = 2 * MODEL.num_layers + 1  # forward and backward; what is not in a block stays for the backward pass
    assert counts == [{"_allgather_base_": gathers}] * 2 + [
        {"_allgather_base_": gathers, "_reduce_scatter_base_": MODEL.num_layers + 1}
    ]
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "copied"), [(torch.float32, True), (torch.bfloat16, False)])
def test_compiled_shards_do_not_add_to_a_gradient_twice(config, fake_world, monkeypatch, dtype, copied):
    """Inductor hands one tensor to two parameters. In float32 FSDP2 would add the micro-batches up in it (with 2
    micro-batches on 2 processes the gradient's norm was 3.34 instead of 2.49): there each is exchanged, which copies
    it.
    """
    monkeypatch.setattr(torch, "compile", lambda model: model)
    settings = change(config, data_parallel="fsdp2", compile=True).train
    engine, tokens = Engine(Phi1(MODEL, dtype), fake_world(4), settings), torch.zeros(1, 8, dtype=torch.long)
    with CommDebugMode() as comm, engine.exchanging(False):
        engine.network(tokens, targets=tokens).backward()
    assert any("reduce_scatter" in str(op) for op in comm.get_comm_counts()) == copied
