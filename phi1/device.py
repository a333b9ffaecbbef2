"""Which device "auto" and the names that users give mean."""

import torch

from phi1.errors import UserError


def resolve(name: str, option: str) -> torch.device:
    """auto: a GPU where there is one, else the CPU. Or cpu, cuda, cuda:1.

    Raises UserError, which names `option` ("--device", "train.device"), for another name or a device that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{option} = {name!r}: must be auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{option} = {name!r}: must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"{option} = {name!r}: no GPU that torch can use here; choose auto or cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UserError(f"{option} = {name!r}: this machine has {torch.cuda.device_count()} GPUs")
    return device
