"""How the processes of a training share its model, and when they exchange gradients.

    one process                 the model as it is
    DDP                         each process holds weights, gradients and optimizer state whole
    FSDP2 (`fully_shard`)       each holds a shard of all three; a layer is whole only while it computes

What is computed does not depend on it but for the order of float32 sums. Under FSDP2 a block's matrices are cast to the
computation's type by each process for its shard, gathered in that type, and freed behind the block; gradients of a
step's micro-batches add up in float32 on each process, whole, and are exchanged once, in the last, as under DDP.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from phi1.config import LoopConfig
from phi1.distributed import World, whole
from phi1.model import Phi1


class Engine:
    """A model that the processes of `world` train together, as `settings` say.

    model: whole, in float32, on the CPU, the same in every process. It is moved to the device; under FSDP2 its
    parameters become this process's shards (DTensors).
    """

    def __init__(self, model: Phi1, world: World, settings: LoopConfig) -> None:
        self._model = model
        self.sharded = world.distributed and settings.data_parallel == "fsdp2"
        if self.sharded:
            _shard(model, world)
        else:
            model.to(world.device)
        # Gradients have buffers of their own from the start. Left to autograd, compiled code hands one tensor to two
        # parameters whose gradients are equal (b_attention, b_mlp), and accumulating would add to it twice.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        # FSDP2 leaves it to autograd until they are exchanged, unless it accumulates copies in another type.
        self._always_exchange = self.sharded and settings.compile and model.compute_dtype == torch.float32
        network: Any = torch.compile(model) if settings.compile else model
        if world.distributed and not self.sharded:
            devices = [world.device] if world.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)
        self.network: Callable[..., Tensor] = network
        """The model's forward pass, whose gradients are averaged over the processes."""

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around the micro-batches of a step: weights are cast to the computation's type once. FSDP2 casts in each
        pass: a process its shard of a block, before it is gathered for that pass alone.
        """
        cast = not self.sharded and self._model.compute_dtype not in (None, torch.float32)
        with self._model.cast_once() if cast else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def exchanging(self, exchange: bool) -> Iterator[None]:
        """Within the block a backward pass adds gradients up here, and only if `exchange` over the processes too."""
        if isinstance(self.network, DistributedDataParallel):
            with contextlib.nullcontext() if exchange else self.network.no_sync():
                yield
            return
        if self.sharded:
            assert isinstance(self._model, FSDPModule)
            self._model.set_requires_gradient_sync(exchange or self._always_exchange)
        yield

    def clip_gradient(self, norm: float) -> float:
        """Scales the gradient down to at most `norm`; returns the norm that it had, of all shards together."""
        return whole(torch.nn.utils.clip_grad_norm_(self._model.parameters(), norm)).item()


def _shard(model: Phi1, world: World) -> None:
    """Turns a model on the CPU into this process's shards of it on its device, layer by layer."""
    # What is not in a block is gathered in float32: the embedding's gradient adds up over a batch's tokens.
    # A block's output may be a view of what a kernel wrote. Nothing changes it in place, which is what FSDP2 warns of.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPBlock\) returned a view", UserWarning)
    low = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=low)
    fully_shard(model, mesh=world.mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
