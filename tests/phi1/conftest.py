"""Shared by the tests of the trainer: token shards and a configuration of seconds."""

import pathlib
import random
import sys

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from phi1.config import DataConfig, LoopConfig, OptimizerConfig, TrainConfig
from phi1.distributed import World
from phi1.tokenizer import train_tokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # helper modules beside the tests

from training import MODEL, write


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake_world():
    """Makes a process of many, whose collectives do nothing."""
    worlds = []

    def make(size):
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        worlds.append(World("cpu"))
        worlds[0].distributed, worlds[0].size = True, size
        return worlds[0]

    yield make
    worlds[0].__exit__()


@pytest.fixture(scope="session")
def texts():
    generator = random.Random(0)
    return [f"def f{i % 7}(x):\n    return x + {generator.randint(0, 9)}\n" for i in range(300)]


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_tokenizer(texts, 320)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory, tokenizer, texts):
    return write(tmp_path_factory.mktemp("data") / "tokens", tokenizer, texts)


@pytest.fixture(scope="session")
def masked_tokens(tmp_path_factory, tokenizer, texts):
    return write(tmp_path_factory.mktemp("data") / "masked", tokenizer, texts, masked=True)


@pytest.fixture
def config(tmp_path, tokens):
    return TrainConfig(
        MODEL,
        DataConfig(tokens, sequence_length=32),
        LoopConfig(
            tmp_path / "run",
            steps=8,
            sequences_per_step=8,
            micro_batch=4,
            precision="fp32",
            device="cpu",
            tune=False,
            log_every=2,
            checkpoint_every=3,
            keep_last=99,
        ),
        OptimizerConfig(lr=3e-3, warmup_steps=2),
    )
