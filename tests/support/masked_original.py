"""The masked original that a pruned model has to be; nothing of the library is used here.

Shapes cannot tell whether the right units went: a layer that lost the wrong channels, or regrouped
heads, has the shapes that its config asks for. Here the original model, at full width, has the
weights of the removed units set to zero and its norms taken over the kept channels only, and must
compute what the pruned one does.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

# The child generates from ``input_ids``, which this class has not: the model in it is saved.
WITHOUT_HEAD = ("whisper",)
_TRANSFORMERS_4 = transformers.__version__.startswith("4.")


def kept_channels(before: torch.Tensor, after: torch.Tensor) -> list[torch.Tensor]:
    """For each dimension of a parameter, the original positions that are left, found by value.

    The parameters are random, so that a value that occurs once stands for its place.
    """
    old, new = before.detach().double().numpy(), after.detach().double().numpy()
    assert old.ndim == new.ndim
    kept = [np.arange(size) for size in new.shape]
    if old.size and old.shape != new.shape:
        values, first, counts = np.unique(old, return_index=True, return_counts=True)
        where = np.searchsorted(values, new).clip(max=len(values) - 1)
        places = np.unravel_index(first[where], old.shape)
        for dim, (size, new_size) in enumerate(zip(old.shape, new.shape, strict=True)):
            if size != new_size:
                certain = np.where(counts[where] == 1, places[dim], size)
                kept[dim] = np.moveaxis(certain, dim, 0).reshape(new_size, -1).min(1)
                assert (np.diff(kept[dim]) > 0).all(), "channels in another order"
                assert (kept[dim] < size).all(), "channels that no value tells"
    if old.size:
        assert (old[np.ix_(*kept)] == new).all(), "values that the original has not there"
    return [torch.from_numpy(positions) for positions in kept]


def masked(original: nn.Module, pruned: nn.Module) -> nn.Module:
    """The original at full width with the removed units at zero, its norms over the kept ones."""
    model = copy.deepcopy(original)
    after = dict(pruned.named_parameters(remove_duplicate=False))
    names = dict(original.named_parameters(remove_duplicate=False))
    assert names.keys() == after.keys()
    for name, module in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        left = {
            key: kept_channels(names[prefix + key], after[prefix + key])
            for key, parameter in module._parameters.items()
            if parameter is not None
        }
        if is_norm(module) and not isinstance(module, nn.GroupNorm):
            channels = left["weight"][0]
            if len(channels) < len(module.weight):
                over_kept_channels(module, channels)
            continue
        for key, dims in left.items():
            parameter = module._parameters[key]
            for dim, channels in enumerate(dims):
                gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
                gone[channels] = False
                with torch.no_grad():
                    parameter.index_fill_(dim, gone.nonzero().view(-1), 0.0)
    return model


def is_norm(module: nn.Module) -> bool:
    """A layer norm or an RMS norm, by its build: one 1-D weight, and not a layer of another kind.

    Transformers' RMS norms have no common base class.
    """
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.ndim == 1
        and not isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd))
    )


def over_kept_channels(norm: nn.Module, left: torch.Tensor) -> None:
    """Make a norm look at the kept channels only and give zeros elsewhere."""
    narrow = copy.deepcopy(norm)
    for key, parameter in narrow._parameters.items():
        if parameter is not None:
            narrow._parameters[key] = nn.Parameter(parameter.detach()[left])
    if isinstance(narrow, nn.LayerNorm):
        narrow.normalized_shape = (len(left),)
    if hasattr(narrow, "group_size"):  # as many groups as before (Mamba 2)
        narrow.group_size = narrow.group_size * len(left) // len(norm.weight)
    norm.narrow = narrow  # a submodule, so that .double() reaches it
    first = getattr(norm, "data_format", "") == "channels_first"
    axis = 1 if first or type(norm).__name__ == "LayerNorm2d" else -1  # timm's

    def forward(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        cut = [one.index_select(axis, left) for one in (x, *others)]
        return torch.zeros_like(x).index_copy_(axis, left, narrow(*cut))

    norm.forward = forward


def take_scales(model: nn.Module, pruned: nn.Module) -> None:
    """Numbers that follow widths (attention scales), as the class computes them for the new ones.

    Read from a model freshly built from the pruned config, so that a number that the hook forgot
    to refresh shows as a difference.
    """
    fresh = dict(type(pruned)(copy.deepcopy(pruned.config)).named_modules())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if name in fresh and (isinstance(value, float) or key == "model_dim"):
                setattr(module, key, getattr(fresh[name], key))
        if name in fresh and "embed_scale" in module._buffers:
            module.embed_scale = fresh[name].embed_scale.to(module.embed_scale.dtype)


def head_dim_of(module: Any) -> int:
    """The head dim that an attention module has written down, or that its widths give."""
    written = hasattr(module, "attention_head_size")
    if written or not (hasattr(module, "dim") and hasattr(module, "n_heads")):
        return int(getattr(module, "attention_head_size", getattr(module, "head_dim", 1)))
    return int(module.dim // module.n_heads)


def take_head_dims(model: nn.Module, pruned: nn.Module) -> None:
    """Attention that reads its scale off the head dim as it runs: scale the queries instead."""
    fresh = dict(type(pruned)(copy.deepcopy(pruned.config)).named_modules())
    for name, module in model.named_modules():
        layers = [getattr(module, "query_proj", None)]  # DeBERTa
        if _TRANSFORMERS_4:  # BERT, DistilBERT and GPT-2 read it off too
            names = ("query_proj", "query", "q_lin", "c_attn")
            layers = [next(filter(None, (getattr(module, key, None) for key in names)), None)]
            if isinstance(getattr(module, "scaling", None), float):  # ViT: it keeps its scale
                layers = [None]
        old, new = (head_dim_of(one) for one in (module, fresh.get(name)))
        if isinstance(module, nn.MultiheadAttention):
            layers, old, new = [module], module.head_dim, fresh[name].head_dim
        if layers[0] is not None and old != new:
            for key, parameter in layers[0]._parameters.items():
                if parameter is None:
                    continue
                rows = parameter[: module.embed_dim] if key.startswith("in_proj") else parameter
                if type(layers[0]).__name__ == "Conv1D":  # query, key and value beside each other
                    rows = parameter[..., : module.embed_dim]
                with torch.no_grad():
                    rows.mul_((old / new) ** 0.5)


@contextlib.contextmanager
def closed(model: nn.Module, pruned: nn.Module) -> Iterator[None]:
    """While routers of ``model`` never choose the experts that ``pruned`` has not."""
    gone: list[torch.Tensor] = []
    plain = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = plain(x, weight, *rest)
        return out.index_fill(-1, gone[-1], -1e9) if gone else out

    handles = []
    for name, module in model.named_modules():
        if name.endswith((".gate", ".router")) and "weight" in module._parameters:
            rows = module.weight.abs().sum(1) == 0
            if len(pruned.get_submodule(name).weight) < len(rows):
                where = rows.nonzero().flatten()
                bias = module._buffers.get("e_score_correction_bias")
                if bias is not None:
                    bias[where] = -1e9
                handles += [
                    module.register_forward_pre_hook(lambda *_, where=where: gone.append(where)),
                    module.register_forward_hook(lambda *_: gone.__delitem__(-1)),
                ]
    torch.nn.functional.linear = linear
    try:
        yield
    finally:
        torch.nn.functional.linear = plain
        for handle in handles:
            handle.remove()


def eager(model: Any) -> Any:
    """In float64, experts computed one by one: fused kernels know float32 only."""
    model = model.double()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # timm's own choice
            module.fused_attn = False
    return model


class _InFloat64(TorchFunctionMode):
    """Casts to float32 give float64, and so do constants.

    Transformers 4 needs both: DeepSeek-V3 casts, CLIP fills a mask with float64's least number.
    """

    def __enter__(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.set_default_dtype(torch.float32)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def outputs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The floating-point tensors that a model returns; caches are left out."""
    dtype = next(model.parameters()).dtype
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    double = _InFloat64() if _TRANSFORMERS_4 else contextlib.nullcontext()
    with torch.no_grad(), double:
        result = model(**cast)
    return {k: v for k, v in result.items() if isinstance(v, torch.Tensor)}


def without_zero_channels(value: torch.Tensor, width: int) -> torch.Tensor:
    """A hidden state without the channels that are zero for every input, where it is too wide."""
    if value.shape[-1] == width:
        return value
    return value[..., (value != 0).flatten(0, -2).any(0)]


def assert_same_as_masked(
    original: Any,
    pruned: Any,
    inputs: Mapping[str, torch.Tensor],
    narrow: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """The pruned model computes what the original does with the removed units at zero.

    Args:
        original: a copy made before pruning.
        pruned: the model after pruning, its config brought in step.
        inputs: for one forward pass.
        narrow: those of the pruned model, where they are others.
    """
    reference = masked(original, pruned)
    take_scales(reference, pruned)
    take_head_dims(reference, pruned)
    if _TRANSFORMERS_4 and original.config.model_type in ("gemma", "gemma2"):
        # it scales embeddings by the config's hidden size as it runs
        factor = (pruned.config.hidden_size / original.config.hidden_size) ** 0.5
        reference.model.embed_tokens.register_forward_hook(lambda *given: given[-1] * factor)
    with closed(reference, pruned):
        expected = outputs(eager(reference), inputs)
    got = outputs(eager(copy.deepcopy(pruned)), narrow or inputs)
    assert expected.keys() == got.keys()
    for name, value in got.items():
        full = without_zero_channels(expected[name], value.shape[-1])
        assert full.shape == value.shape, f"{name}: {full.shape} != {value.shape}"
        error = ((value - full).norm() / full.norm()).item()
        assert error <= 1e-6, f"{name}: relative error {error:.1e}"  # norms compute in float32
