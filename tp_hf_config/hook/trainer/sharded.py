"""Prune a model that a ``Trainer`` keeps under FSDP2: the pruned one takes over its object.

The ``Trainer`` holds the model in variables that no callback can reach, so it has to go on with the
same object: everything of the pruned model is put into it.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class _Accelerator:
    """What accelerate's function reads of an ``Accelerator``: all of it is in the shared state."""

    def __init__(self) -> None:
        from accelerate.state import AcceleratorState  # type: ignore[import-untyped]

        self.state: Any = AcceleratorState()
        self.torch_device_mesh = getattr(self.state, "device_mesh", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)


def wrap_as_trainer(module: Any) -> nn.Module:
    """Wrap a module, on the meta device or not, as the running ``Trainer`` wrapped its model."""
    from accelerate.utils.fsdp_utils import (  # type: ignore[import-untyped]
        fsdp2_prepare_model,
    )

    accelerator = _Accelerator()
    plugin = accelerator.state.fsdp_plugin
    loads_on_rank_0, plugin.cpu_ram_efficient_loading = plugin.cpu_ram_efficient_loading, False
    try:
        wrapped: nn.Module = fsdp2_prepare_model(accelerator, module)
    finally:
        plugin.cpu_ram_efficient_loading = loads_on_rank_0
    return wrapped


def cannot_prune_sharded(resumes: bool) -> str | None:
    """Return why the sharded model of the running ``Trainer`` cannot be pruned; ``None``: it can.

    ``resumes``: True if a checkpoint of a run that pruned is resumed.
    """
    if resumes:
        return (
            "under FSDP2 a run cannot be resumed in the middle of pruning. Begin a new one from "
            "the checkpoint, Trainer(from_pretrained(checkpoint), ...).train(), with a callback "
            "for what is left to prune"
        )
    plugin = getattr(_Accelerator().state, "fsdp_plugin", None)
    if plugin is None:
        return (
            "the model was under fully_shard before the Trainer got it, which cannot shard the "
            "pruned one. Let it shard: TrainingArguments(fsdp=True, fsdp_config={'fsdp_version': "
            "2, ...})"
        )
    if plugin.activation_checkpointing:
        return (
            "fsdp_config={'activation_checkpointing': True} puts modules of its own around layers, "
            "and no config describes those. Take TrainingArguments(gradient_checkpointing=True)"
        )
    return None


def take_over(model: nn.Module, new: nn.Module) -> None:
    """Make a module that others hold the same as another one: class, parts, hooks, FSDP2's state.

    What other code has put on the module stays. Its parts are freed.

    Args:
        model: the module that others hold.
        new: the module that it becomes; both share all of their attributes from now on.
    """
    from torch.distributed._composable_state import _module_state_mapping

    attributes = {**vars(model), **vars(new)}
    vars(new).update(attributes)
    model.__class__ = new.__class__
    object.__setattr__(model, "__dict__", vars(new))
    _module_state_mapping[model] = _module_state_mapping[new]
