"""LayerNorm."""

import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.checks import check_device, check_dtype, check_like, check_shape
from kernels.registry import choose, implementation, register

register("layer_norm", "reference", reference.layer_norm)
register("layer_norm", "torch", lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str | None = None) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim, statistics in float32.

    x: (..., hidden). weight, bias: (hidden,), x's dtype. Returns x's shape and dtype.
    Raises ValueError for arguments that do not fit, BackendError if `backend` cannot serve the call.
    """
    check_dtype("x", x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_shape(name, parameter, (x.shape[-1],), "(hidden,), x's last dim")
        check_like(name, parameter, "x", x)
        check_device(name, parameter, "x", x)
    return implementation("layer_norm", choose("layer_norm", x.device.type, backend, dtype=x.dtype))(
        x, weight, bias, eps
    )
