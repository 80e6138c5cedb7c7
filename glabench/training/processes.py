"""The processes of a run: one, or several with the weights, gradients and moments sharded (FSDP2)."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def join(device: str) -> PartialState:
    """This process's place among those that torchrun or accelerate launch started; alone without them."""
    if device == "cpu":
        return PartialState(cpu=True)
    _, _, index = device.partition(":")
    if index:
        torch.cuda.set_device(int(index))
    return PartialState()


def shard(model: torch.nn.Module, state: PartialState) -> None:
    """Shard over the processes, block by block, so that one block's weights are whole at a time.

    All processes hold the same weights before. Gradients are averaged over the processes, in fp32.
    """
    if state.num_processes == 1:
        return
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module)
    fully_shard(model)


def mean(values: torch.Tensor, state: PartialState) -> torch.Tensor:
    """Mean over the processes."""
    return values if state.num_processes == 1 else reduce(values, "mean")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded values on the CPU. Every process calls it for the same tensors in the same order."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


@torch.no_grad()
def fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy unsharded `values` into a tensor that may be sharded; each process has all of them."""
    if isinstance(tensor, DTensor):
        values = values.to(tensor.device)
        # src_data_rank None: every process cuts its own part, and nothing is sent
        part = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(part.to_local())
    else:
        tensor.copy_(values)


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name, tied ones once."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers: dict[str, Any] = {n: t for n, t in model.state_dict().items() if n not in every}
    return {**dict(model.named_parameters()), **buffers}
