"""Find the Hugging Face model inside a module, and refuse weights that cannot be pruned."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from .sharded import is_dtensor, plain_class, sharded_parameters

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def find_pretrained(model: nn.Module) -> tuple[str, PreTrainedModel]:
    """Return the outermost ``PreTrainedModel`` in ``model`` and the name it has there.

    The name is empty when ``model`` itself is the ``PreTrainedModel``.

    Raises:
        UnsupportedModelError: ``model`` contains none, or several side by side, or is a
            DistributedDataParallel.
        TypeError: ``model`` is no module.
    """
    from torch import nn
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(_no_module(model))
    check_unwrapped(model)
    models: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in models)
        if isinstance(module, PreTrainedModel) and not inside:
            models[name] = module
    if not models:
        raise UnsupportedModelError(
            f"{type(model).__name__} contains no transformers.PreTrainedModel, so there is no "
            "config to keep in step. Pass a Hugging Face model, or a module that contains one."
        )
    if len(models) > 1:
        names = ", ".join(f"{name} ({type(module).__name__})" for name, module in models.items())
        raise UnsupportedModelError(
            f"{type(model).__name__} contains {len(models)} Hugging Face models side by side: "
            f"{names}. Expected one. Prune them one at a time, each with a pruner of its own."
        )
    return next(iter(models.items()))


def check_unwrapped(model: nn.Module) -> None:
    """Raise if a model is handed in inside a wrapper of torch (``torch.compile``, data parallel).

    Such a wrapper returns what the model does, so the width of that would be kept for its sake.

    Raises:
        UnsupportedModelError: it is.
    """
    from torch.nn.parallel import DistributedDataParallel
    from transformers import PreTrainedModel

    if isinstance(model, DistributedDataParallel):
        raise UnsupportedModelError(
            "a DistributedDataParallel holds on to the Parameters that it was given, and would not "
            f"train pruned ones. Pass the {type(model.module).__name__} inside, the .module of "
            "that, on every rank, with distributed=True (HFConfigSyncHook, calibrate). After the "
            "step let go of the wrapper, and wrap the pruned model anew"
        )
    children, module = [*getattr(model, "_modules", {}).items()], type(model).__module__
    of_torch = module.startswith("torch.") and not module.startswith("torch.nn.modules.")
    if of_torch and len(children) == 1 and isinstance(children[0][1], PreTrainedModel):
        ((name, inner),) = children
        raise UnsupportedModelError(
            f"{type(model).__name__} is a wrapper of torch around {type(inner).__name__}. Pass the "
            f"model inside, its .{name}, and wrap the pruned model anew after the last step. (To "
            "compile, model.compile() needs no wrapper.)"
        )


def check_has_data(model: nn.Module) -> None:
    """Raise if some of a model's parameters have no data.

    Raises:
        UnsupportedModelError: some are on the meta device, where accelerate leaves offloaded ones.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{plain_class(type(model)).__name__}: {name} is on the meta device (no data, or "
                "offloaded by accelerate). Load the whole model into memory: "
                "from_pretrained(folder) without device_map offloading. A model that does not fit "
                "is pruned from folder to folder: tp-hf-config prune FOLDER --out OUT --stream."
            )


def _no_module(given: object) -> str:
    """Return the message of the TypeError: what to pass instead of this object."""
    from torch import nn

    held = [
        name
        for name, value in getattr(given, "__dict__", {}).items()
        if isinstance(value, nn.Module)
    ]
    if held:
        instead = f"Pass what it holds: its .{held[0]}"
    elif isinstance(given, (str, PathLike)):
        instead = "Load it first, with from_pretrained of its class (AutoModelForCausalLM, ...)"
    else:
        instead = "Pass a Hugging Face model, or a module that contains one"
    return f"{type(given).__name__} given where a model was expected. {instead}."


def check_followable(model: PreTrainedModel, weights: bool = True, sharded: bool = False) -> None:
    """Raise if the model's weights are not plain, whole tensors in memory.

    Args:
        model: the model.
        weights: True if the weights are going to be pruned and so must have data.
        sharded: True to accept those that FSDP2 keeps in shards.

    Raises:
        UnsupportedModelError: the weights are quantised, on the meta device, offloaded or sharded.
    """
    name = plain_class(type(model)).__name__
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise UnsupportedModelError(_quantised(model))
    for layer_name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if callable(weight) and not hasattr(weight, "parameters"):  # a method that unpacks
            raise UnsupportedModelError(
                f"{name}: {layer_name} ({type(layer).__module__}.{type(layer).__name__}) holds "
                "packed weights, a quantised storage format. Load the model in float16, bfloat16 "
                "or float32, prune, and quantise the result."
            )
    if weights:
        check_has_data(model)
    by_fsdp = sharded_parameters(model)
    for parameter_name, parameter in model.named_parameters():
        divided = is_dtensor(parameter.data) or hasattr(parameter, "ds_id")
        if divided and not (sharded and parameter in by_fsdp):
            what = f"{name}: {parameter_name}"
            raise UnsupportedModelError(_sharded(what, parameter in by_fsdp))
        whole = not (parameter.is_floating_point() or parameter.is_complex())
        if whole or parameter.element_size() == 1:  # float8
            raise UnsupportedModelError(
                f"{name}: {parameter_name} holds {parameter.dtype}, a quantised storage format. "
                "Load the model in float16, bfloat16 or float32, prune, and quantise the result."
            )


def _sharded(what: str, by_fsdp: bool) -> str:
    """Return why a model on several processes is refused, and what to do."""
    if by_fsdp:
        return (
            f"{what} is sharded by fully_shard (FSDP2). A pruner that is constructed with "
            "HFConfigSyncHook(rebuild=shard) prunes it, where shard(module) makes your fully_shard "
            "calls; anything else wants the whole model in one process."
        )
    return (
        f"{what} is sharded over several processes by tensor parallelism or DeepSpeed ZeRO-3. "
        "Prune the model's folder, and load the pruned one: tp-hf-config prune FOLDER, or "
        "apply_cuts(folder, cuts, out) with the cuts of a pruner elsewhere. Of sharded models "
        "only those of fully_shard (FSDP2) can be pruned."
    )


def _quantised(model: PreTrainedModel) -> str:
    """Return why a quantised model is refused, and what to do."""
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else None
    method = method or getattr(config, "quant_method", None) or "method unknown"
    head = f"{type(model).__name__} is quantised ({getattr(method, 'value', method)})"
    linear = [module for module in model.modules() if "Linear" in type(module).__name__]
    plain = all(type(module).__module__.startswith("torch.nn") for module in linear)
    if linear and plain and all(weight.is_floating_point() for weight in model.parameters()):
        return (
            f"{head}, although its weights are plain tensors by now (as after loading a GGUF "
            "file), and save_pretrained would refuse it. Say so first: "
            "model.hf_quantizer.remove_quantization_config(model)"
        )
    return (
        f"{head}: its weights are packed and cannot be pruned. Load it in float16, bfloat16 or "
        "float32, prune, and quantise the result."
    )
