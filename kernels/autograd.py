"""What the ops' autograd functions share: a second derivative that is an error, never a wrong number."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels.registry import differentiated

F = TypeVar("F", bound=Callable[..., Any])
_PLAIN = (Tensor, torch.nn.Parameter)


class _Refusal(torch.autograd.Function):
    """Gives the first `count` tensors on; to differentiate them with respect to what any of the tensors depends on
    raises.
    """

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:count]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(
            f"{ctx.op}: a second derivative was asked for, and this backend has the first only; use backend='reference'"
        )


def operator(name: str) -> Callable[[F], F]:
    """Decorates what the operator of this name does, on tensors of a CPU or a GPU."""

    def decorate(function: F) -> F:
        torch.library.impl(name, ("cpu", "cuda"))(function)
        return function

    return decorate


def untransformed(*tensors: Tensor) -> bool:
    """Whether nothing differentiates, transforms or traces a call on these, and each is its numbers as they lie in
    memory.
    """
    return (
        not torch.compiler.is_compiling()
        and not differentiated(*tensors)
        # No subclass with a dispatcher of its own, nor a view whose numbers count negative.
        and all([type(x) in _PLAIN and not x.is_neg() for x in tensors])
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def unwatched(*tensors: Tensor) -> bool:
    """Whether nothing records, transforms or traces a call on these.

    Then the function behind an operator can be called as it is: autograd.Function and PyTorch's dispatcher take longer
    than the kernels do for a token (flash_attention of 1 query and 16 keys: 66 microseconds with them, 45 without;
    Emerald Rapids).
    """
    return untransformed(*tensors) and not torch.autograd._profiler_enabled()


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, a view for one that came before: torch.compile refuses an autograd.Function a tensor given twice."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(x.view_as(x) if any(x is y for y in tensors[:i]) else x for i, x in enumerate(tensors))


def once_differentiable(op: str) -> Callable[[Callable[..., tuple[Any, ...]]], Callable[..., tuple[Any, ...]]]:
    """Decorates the `backward(ctx, saved, *grads)` of the autograd.Function of `op`; saved: `ctx.saved_tensors`.

    With create_graph=True the gradients hang in the graph on `saved` and `grads`, by a node that raises
    NotImplementedError when it is differentiated. `saved` must hold all inputs that the gradients depend on.
    PyTorch's decorator of this name hangs them on leaves of its own, and only where `grads` require gradients:
    `torch.autograd.grad` never comes by there, and takes them for constants.
    """

    def decorate(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        @functools.wraps(backward)
        def refusing(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            saved = ctx.saved_tensors  # once: under a checkpoint each access makes them again
            # torch.compile refuses second derivatives of its graphs itself.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, saved, *grads)
            with torch.no_grad():
                results = backward(ctx, saved, *grads)
            given = [x for x in results if x is not None]
            sources = [x for x in (*saved, *grads) if x is not None and x.requires_grad]
            refused = iter(_Refusal.apply(op, len(given), *given, *sources))
            return tuple(None if x is None else next(refused) for x in results)

        return refusing

    return decorate
