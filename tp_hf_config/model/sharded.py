"""Weights that FSDP2 (``fully_shard``) keeps in shards on several processes: read and fill them.

Torch's distributed modules are looked up, not imported: a model is under FSDP2 only if somebody
else has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _fsdp_module() -> Any:
    """Return the class that ``fully_shard`` puts before a module's own; ``None``: not imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def plain_class(model_class: type) -> type:
    """Return the class that a model had before ``fully_shard``."""
    fsdp = _fsdp_module()
    if fsdp is None or not issubclass(model_class, fsdp):
        return model_class
    return next(base for base in model_class.__mro__ if not issubclass(base, fsdp))


def _sharded_parts(module: nn.Module) -> Iterator[Any]:
    """Yield those parts of a module, itself included, that are under ``fully_shard``."""
    fsdp = _fsdp_module()
    if fsdp is not None:
        yield from (part for part in module.modules() if isinstance(part, fsdp))


def is_sharded(module: nn.Module) -> bool:
    """True if a module, or one inside it, is under ``fully_shard``."""
    return any(True for _ in _sharded_parts(module))


def is_dtensor(tensor: Tensor) -> bool:
    """True if a tensor is spread over several processes, as FSDP2 and tensor parallelism do."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def sharded_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that FSDP2 or HSDP alone divides, without tensor parallelism."""
    managed: set[Any] = {p for part in _sharded_parts(module) for p in part.parameters()}
    return {
        parameter
        for parameter in managed
        if is_dtensor(parameter)
        and sum(not placement.is_replicate() for placement in parameter.placements) == 1
    }


def reshard(module: nn.Module) -> None:
    """Put the shards back into the place of parameters that a forward pass has gathered."""
    for part in _sharded_parts(module):
        part.reshard()


def whole(tensor: Any) -> Tensor:
    """Return all values of a tensor; of shards, gathered from all ranks, which all have to ask."""
    if not is_dtensor(tensor):
        return tensor  # type: ignore[no-any-return]
    with torch.no_grad():
        return tensor.detach().full_tensor()  # type: ignore[no-any-return]


def divided_like(values: Tensor, parameter: Any) -> Tensor:
    """Return values that every rank has, divided over the ranks as a parameter is."""
    if not is_dtensor(parameter):
        return values.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(values, mesh, placements, src_data_rank=None)
