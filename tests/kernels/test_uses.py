"""The ops as people use them: each cell of op, use and backend works or is an error that says so.

`python tests/kernels/test_uses.py` (with the repository on PYTHONPATH) writes docs/uses.md from what it finds; the test
compares. The column `cpu` holds for `triton` and `cuda` too: they are called through the same operators and
autograd.Functions.
"""

import concurrent.futures
import copy
import faulthandler
import io
import multiprocessing
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.exc
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(pathlib.Path(__file__).parent)]

from calls import CALLS, Call  # noqa: E402

TABLE = ROOT / "docs" / "uses.md"
BACKENDS = ("reference", "torch", "cpu")
USED = [call for call in CALLS if call.differentiable]


class Layer(torch.nn.Module):
    """The call as a module: the differentiable tensors are its parameters."""

    def __init__(self, name: str, backend: str) -> None:
        super().__init__()
        self.name, self.backend = name, backend
        call = self.call
        for key, x in call.tensors(torch.float32).items():
            if key in call.differentiable:
                self.register_parameter(key, torch.nn.Parameter(x))
            else:
                self.register_buffer(key, x)

    @property
    def call(self) -> Call:
        return next(call for call in CALLS if call.name == self.name)

    def forward(self, factor: Tensor) -> tuple[Tensor, ...]:
        tensors: dict[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        tensors = {name: x * factor if name in self.call.differentiable else x for name, x in tensors.items()}
        return self.call.outputs(self.backend, tensors)


FACTOR = torch.tensor(0.7)


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([x.sin().sum() for x in outputs]).sum()


def gradients(layer: Layer, run: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
    outputs = run(FACTOR)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss(outputs), list(layer.parameters()))]


def same(found: list[Tensor] | tuple[Tensor, ...], expected: list[Tensor] | tuple[Tensor, ...]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def plain(layer: Layer) -> list[Tensor]:
    return gradients(layer, layer)


# ----------------------------------------------------------- uses: each raises, or has compared with the plain call


def compiled(layer: Layer) -> None:
    torch._dynamo.reset()
    same(gradients(layer, torch.compile(layer, fullgraph=True, backend="aot_eager")), plain(layer))


def checkpointed(layer: Layer, reentrant: bool) -> None:
    factor = FACTOR.clone().requires_grad_()  # reentrant checkpoints look at inputs only
    outputs = checkpoint(layer, factor, use_reentrant=reentrant)
    loss(outputs).backward()
    same([x.grad for x in layer.parameters()], plain(layer)[len(outputs) :])  # type: ignore[misc]
    layer.zero_grad()


def deepcopied(layer: Layer) -> None:
    same(plain(copy.deepcopy(layer)), plain(layer))


def saved(layer: Layer) -> None:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    same(plain(torch.load(file, weights_only=False)), plain(layer))


def in_threads(layer: Layer) -> None:
    before = _threads()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result in pool.map(plain, [layer] * 8):
            same(result, plain(layer))
    # A thread has ended for Python before it has for the operating system. MKL cleans up in between, and a process that
    # is forked then waits for its lock for ever: 8 of 662 forks after such threads did, of torch.mm alone, and none of
    # 1,841 that waited as this does.
    while _threads() > before:
        time.sleep(0.001)


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def in_inference_mode(layer: Layer) -> None:
    with torch.inference_mode():
        outputs = layer(FACTOR)
    same(outputs, layer(FACTOR))


def _as_function(layer: Layer) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss as a function of the first parameter, and that parameter."""
    name, x = next(layer.named_parameters())
    return lambda t: loss(torch.func.functional_call(layer, {name: t}, FACTOR)), x.detach()


def func_grad(layer: Layer) -> None:
    function, x = _as_function(layer)
    same([torch.func.grad(function)(x)], [plain(layer)[-len(list(layer.parameters()))]])


def func_vmap(layer: Layer) -> None:
    function, x = _as_function(layer)
    same([torch.func.vmap(function)(torch.stack([x, 2 * x]))], [torch.stack([function(x), function(2 * x)]).detach()])


def func_jvp(layer: Layer) -> None:
    function, x = _as_function(layer)
    slope = torch.func.jvp(function, (x,), (x,))[1]
    wanted = (plain(layer)[-len(list(layer.parameters()))] * x).sum()
    same([slope], [wanted])


def second_derivative(layer: Layer) -> None:
    first = torch.autograd.grad(loss(layer(FACTOR)), list(layer.parameters()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(layer.parameters()))  # type: ignore[arg-type]
    other = Layer(layer.name, "reference")
    first = torch.autograd.grad(loss(other(FACTOR)), list(other.parameters()), create_graph=True)
    same(second, torch.autograd.grad(sum(g.square().sum() for g in first), list(other.parameters())))  # type: ignore[arg-type]


def _in_process(layers: list[Layer], queue: Any) -> None:
    for layer in layers:
        try:
            queue.put([x.numpy() for x in plain(layer)])
        except Exception as error:
            queue.put(describe(error))


class Answers(torch.utils.data.Dataset[list[Tensor]]):
    """A data set whose items a worker makes by the op."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[Tensor]:
        return [x.detach() for x in plain(self.layer)]


def _dies_if_it_hangs(worker: int) -> None:
    """Says where, which the process that waits cannot."""
    faulthandler.dump_traceback_later(200, exit=True)


def in_data_loader(layer: Layer) -> None:
    plain(layer)  # with OpenMP's threads there before the worker is forked
    items = torch.utils.data.DataLoader(
        Answers(layer), batch_size=None, num_workers=1, worker_init_fn=_dies_if_it_hangs
    )
    for item in items:
        same(item, plain(layer))


def default_meta(layer: Layer) -> None:
    expected = plain(layer)
    with torch.device("meta"):
        found = plain(layer)
    same(found, expected)


USES: dict[str, Callable[[Layer], None]] = {
    "torch.compile(fullgraph=True)": compiled,
    "checkpoint, reentrant": lambda layer: checkpointed(layer, True),
    "checkpoint, non-reentrant": lambda layer: checkpointed(layer, False),
    "deepcopy of a module": deepcopied,
    "torch.save, torch.load of a module": saved,
    "4 threads at once": in_threads,
    "inference mode": in_inference_mode,
    "DataLoader worker (forked)": in_data_loader,
    'under torch.device("meta")': default_meta,
    "second derivative": second_derivative,
    "torch.func.grad": func_grad,
    "torch.func.vmap": func_vmap,
    "torch.func.jvp": func_jvp,
}


def describe(error: Exception) -> str:
    """The error's type and how its message begins; which of its own errors TorchDynamo wraps ours in varies."""
    text = " ".join(str(error).split())
    if isinstance(error, torch._dynamo.exc.TorchDynamoException) and "BackendError" in text:
        return "BackendError, by way of TorchDynamo"
    return (
        f"{type(error).__name__}: {text[:70].rsplit(' ', 1)[0]} …"
        if len(text) > 70
        else f"{type(error).__name__}: {text}"
    )


def found() -> dict[tuple[str, str, str], str]:
    """(op, use, backend) -> what comes of it. A wrong number is no cell: AssertionError goes up."""
    cells = {}
    layers = [Layer(call.name, backend) for call in USED for backend in BACKENDS]
    for layer in layers:
        for use, run in USES.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run(layer)
                cells[layer.name, use, layer.backend] = "works"
            except AssertionError:
                raise
            except Exception as error:
                cells[layer.name, use, layer.backend] = describe(error)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_process, args=(layers, queue))
    process.start()
    for layer in layers:
        answer = queue.get(timeout=300)
        if not isinstance(answer, str):
            same([torch.from_numpy(x) for x in answer], plain(layer))
            answer = "works"
        cells[layer.name, "spawned process", layer.backend] = answer
    process.join()
    return cells


def table(cells: dict[tuple[str, str, str], str]) -> str:
    lines = [
        "# What the ops can be used with",
        "",
        "Written by `python tests/kernels/test_uses.py`, checked by the test of that name: each cell was run on a CPU, "
        "and what",
        "works was compared with the plain call. `triton` and `cuda` are called as `cpu` is. Attention on `torch` with "
        "documents",
        "is refused under torch.compile, since they are cut at places that only the run knows. A forked worker can "
        "hang in MKL if a",
        "thread that computed products is just ending when it is forked (PyTorch's own products do, without ours).",
        "",
        f"| op | use | {' | '.join(BACKENDS)} |",
        f"|---|---|{'---|' * len(BACKENDS)}",
    ]
    for call in USED:
        for use in [*USES, "spawned process"]:
            lines.append(f"| {call.name} | {use} | {' | '.join(cells[call.name, use, b] for b in BACKENDS)} |")
    return "\n".join(lines) + "\n"


def test_every_cell_of_the_table() -> None:
    assert table(found()) == TABLE.read_text(), (
        f"write {TABLE.relative_to(ROOT)} anew: python tests/kernels/test_uses.py"
    )


def test_all_that_is_not_refused_by_pytorch_works() -> None:
    """The table hides no failure: its errors are those of uses that PyTorch has for plain operators only."""
    refusable = ("second derivative", "torch.func", "torch.compile")
    for line in TABLE.read_text().splitlines():
        if "Error" in line or "Unsupported" in line:
            assert any(use in line for use in refusable), line


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(found()))
