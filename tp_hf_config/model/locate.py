"""Find the Hugging Face model inside a module, and refuse weights that cannot be pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..arguments import check
from ..errors import UnsupportedModelError, warn
from .sharded import behind, is_dtensor, plain_class, sharded_parameters

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def find_pretrained(model: nn.Module) -> tuple[str, PreTrainedModel]:
    """Return the outermost ``PreTrainedModel``, and its name in ``model`` (may be empty)."""
    from transformers import PreTrainedModel

    check("model", model, "nn.Module")
    check_unwrapped(model)
    models: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in models)
        if isinstance(module, PreTrainedModel) and not inside:
            models[name] = module
    if not models:
        raise UnsupportedModelError(
            f"{type(model).__name__} contains no transformers.PreTrainedModel, so there is no "
            "config to update. Pass a Hugging Face model, or a module that contains one."
        )
    if len(models) > 1:
        names = ", ".join(f"{name} ({type(module).__name__})" for name, module in models.items())
        raise UnsupportedModelError(
            f"{type(model).__name__} contains {len(models)} Hugging Face models side by side: "
            f"{names}. Expected one. Prune them one at a time, each with its own pruner."
        )
    return next(iter(models.items()))


def check_unwrapped(model: nn.Module) -> None:
    """Raise for a wrapper of torch, since pruning would keep the width of the wrapper's output."""
    from torch.nn.parallel import DistributedDataParallel
    from transformers import PreTrainedModel

    if isinstance(model, DistributedDataParallel):
        raise UnsupportedModelError(
            "a DistributedDataParallel keeps the Parameters that it was made with, and would not "
            f"train pruned ones. Pass the {type(model.module).__name__} inside, its .module, on "
            "every rank, with distributed=True (HFConfigSyncHook, calibrate). After the step, "
            "discard the wrapper and wrap the pruned model again"
        )
    children, module = [*getattr(model, "_modules", {}).items()], type(model).__module__
    of_torch = module.startswith("torch.") and not module.startswith("torch.nn.modules.")
    if of_torch and len(children) == 1 and isinstance(children[0][1], PreTrainedModel):
        ((name, inner),) = children
        raise UnsupportedModelError(
            f"{type(model).__name__} is a wrapper of torch around {type(inner).__name__}. Pass the "
            f"model inside, its .{name}, and wrap the pruned model again after the last step. (To "
            "compile, model.compile() needs no wrapper.)"
        )


def has_no_data(model: nn.Module) -> bool:
    """True if a model was built on the meta device; False if accelerate offloads its weights."""
    return all(parameter.is_meta for parameter in model.parameters()) and not any(
        hasattr(module, "_hf_hook") for module in model.modules()
    )


def check_has_data(model: nn.Module) -> None:
    """Raise if parameters are on the meta device, as accelerate's offloaded ones are."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta and behind(model) is model:
            raise UnsupportedModelError(
                f"{plain_class(type(model)).__name__}: {name} is on the meta device (no data, or "
                "offloaded by accelerate). Load the whole model into memory: "
                "from_pretrained(folder) without device_map offloading. A model that does not fit "
                "is pruned from folder to folder: tp-hf-config prune FOLDER --out OUT --stream."
            )


def check_followable(model: PreTrainedModel, weights: bool = True, sharded: bool = False) -> None:
    """Raise if weights are quantised, sharded (``sharded`` accepts FSDP2), or lack data."""
    check_plain(model)
    name = plain_class(type(model)).__name__
    if weights:
        check_has_data(model)
    by_fsdp = sharded_parameters(model)
    for parameter_name, parameter in model.named_parameters():
        divided = is_dtensor(parameter.data) or hasattr(parameter, "ds_id")
        if divided and not (sharded and parameter in by_fsdp):
            what = f"{name}: {parameter_name}"
            raise UnsupportedModelError(_sharded(what, parameter in by_fsdp))


def check_plain(model: PreTrainedModel) -> None:
    """Raise if weights are quantised; remove the quantization config of unpacked ones."""
    name = plain_class(type(model)).__name__
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        method = _method(model)
        if not _is_unpacked(model):
            raise UnsupportedModelError(
                f"{name} is quantised ({method}): its weights are packed and cannot be pruned. "
                f"{_INSTEAD}"
            )
        # plain tensors from a quantised file (GGUF): save_pretrained shall write them as they are
        quantizer: Any = getattr(model, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(model)
        setattr(model, "is_quantized", False)
        vars(model.config).pop("quantization_config", None)
        warn(
            f"{name} was loaded from quantised weights ({method}), which are now plain tensors. "
            "Its quantization_config was removed, so save_pretrained writes plain weights",
            UserWarning,
        )
    for layer_name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if callable(weight) and not hasattr(weight, "parameters"):  # a method that unpacks
            raise UnsupportedModelError(
                f"{name}: {layer_name} ({type(layer).__module__}.{type(layer).__name__}) holds "
                f"packed weights, a quantised storage format. {_INSTEAD}"
            )
    for parameter_name, parameter in model.named_parameters():
        if not _is_float(parameter):
            raise UnsupportedModelError(
                f"{name}: {parameter_name} holds {parameter.dtype}, a quantised storage format. "
                f"{_INSTEAD}"
            )


def _sharded(what: str, by_fsdp: bool) -> str:
    if by_fsdp:
        return (
            f"{what} is sharded by fully_shard (FSDP2). Construct the pruner with "
            "hooks=[HFConfigSyncHook(shard=shard)], where shard(module) makes your fully_shard "
            "calls. Everything else needs the whole model in one process."
        )
    return (
        f"{what} is sharded over several processes by tensor parallelism or DeepSpeed ZeRO-3. Only "
        "models that are sharded by fully_shard (FSDP2) can be pruned. Prune the model's folder "
        "instead, and load the result: tp-hf-config prune FOLDER, or apply_cuts(folder, cuts, out) "
        "with the cut list of an unsharded model."
    )


def _method(model: PreTrainedModel) -> str:
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else None
    method = method or getattr(config, "quant_method", None) or "method unknown"
    return str(getattr(method, "value", method))


def _is_unpacked(model: PreTrainedModel) -> bool:
    import torch

    linear = [type(module) for module in model.modules() if "Linear" in type(module).__name__]
    plain = all(cls.__module__.startswith(("torch.nn.", "transformers.models.")) for cls in linear)
    tensors = [parameter.data for parameter in model.parameters()]
    return plain and all(_is_float(tensor) and type(tensor) is torch.Tensor for tensor in tensors)


def _is_float(tensor: torch.Tensor) -> bool:
    """True for floating point dtypes that torch can compute with, so not for float8."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.element_size() > 1


_INSTEAD = "Load the model in float16, bfloat16 or float32, prune, and quantise the result."
