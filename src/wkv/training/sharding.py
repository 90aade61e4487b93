"""Parameters divided between processes: torch's `fully_shard` (FSDP2) under accelerate's configuration.

accelerate 1.15 does this on accelerators only, for the module whose forward pass gives the loss. Here it is the model
that is divided, so that segments, carried states and evaluations, which call the model itself, work as they are, on
the CPU too.

A parameter that is divided is a DTensor: this process holds a part of its first dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wkv.layers.language_model import LanguageModel
from wkv.layers.meta import without_values


def shard(model: LanguageModel, options: Any) -> None:
    """Divide the parameters of a model, block by block, between all processes; its forward pass collects them.

    Parameters stay in their type: autocast makes bfloat16 of what may be, as in one process.

    Args:
        model: on its device; the same on every process.
        options: accelerate's `FullyShardedDataParallelPlugin`; `reshard_after_forward` and `cpu_offload` count.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import OffloadPolicy, fully_shard, register_fsdp_forward_method

    device = model.ln_out.weight.device.type
    settings: dict[str, Any] = {"mesh": init_device_mesh(device, (dist.get_world_size(),))}
    if isinstance(options.cpu_offload, OffloadPolicy):
        settings["offload_policy"] = options.cpu_offload
    # States are views of activations, and nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if hasattr(model.blocks[0], "ln0"):
        fully_shard(model.blocks[0].ln0, **settings)  # the model calls it before the block
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=options.reshard_after_forward, **settings)
    fully_shard(model, **settings)
    register_fsdp_forward_method(model, "forward_features")


def settle(model: nn.Module) -> None:
    """Let go of parameters that a forward pass without a backward pass has left collected: they may change now."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, in its memory; a tensor that is not divided as it is."""
    if not _is_divided(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must call this."""
    if not _is_divided(tensor):
        return tensor
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


def divided_like(full: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every process has, divided as `parameter` is (if it is)."""
    if not _is_divided(parameter) or full.shape != parameter.shape:
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(full.to(parameter.device), mesh, placements, src_data_rank=None)


def whole_model(model: LanguageModel) -> LanguageModel:
    """A copy on the CPU with all parameters; every process must call this."""
    from wkv import registry

    settle(model)
    values = {name: whole(parameter).cpu() for name, parameter in model.named_parameters()}
    with without_values():
        copy = registry.entry(model.name).model_class(model.config)
    copy.load_state_dict(values, assign=True)
    copy.tokenizer, copy.tuned_state = model.tokenizer, model.tuned_state
    return copy


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors on the CPU; every process must call this."""
    state = optimizer.state_dict()
    moments = {index: _each(values, lambda x: whole(x).cpu()) for index, values in state["state"].items()}
    return {**state, "state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `whole_optimizer_state`, or the `state_dict` of an optimizer in one process, gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: _each(values, lambda x, index=index: divided_like(x, parameters[index]))
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _each(values: Mapping[str, Any], change: Any) -> dict[str, Any]:
    return {name: change(x) if isinstance(x, Tensor) else x for name, x in values.items()}


def _is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")
