"""The masked original that a pruned model has to be."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import masking
import small
import torch
from torch import nn

from tp_hf_config.model.build import Refusal
from tp_hf_config.twin.masked_check import cut_dims_of

# The child generates from ``input_ids``, which this class has not: the model in it is saved.
WITHOUT_HEAD = ("whisper",)


def kept_channels(before: torch.Tensor, after: torch.Tensor) -> list[torch.Tensor]:
    """For each dimension of a parameter, the original positions that are left, found by value.

    The parameters are random, so that a value stands for its place; the library's own record is
    not looked at.
    """
    found = cut_dims_of(before, after)
    assert not isinstance(found, Refusal), found.reason
    return [dim.kept for dim in found]


def masked(original: nn.Module, pruned: nn.Module) -> nn.Module:
    """The original at full width with the removed units at zero, its norms over the kept ones."""
    model = copy.deepcopy(original)
    after = dict(pruned.named_parameters(remove_duplicate=False))
    names = dict(original.named_parameters(remove_duplicate=False))
    assert names.keys() == after.keys()
    for name, module in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        left = {
            key: kept_channels(names[prefix + key].detach(), after[prefix + key].detach())
            for key, parameter in module._parameters.items()
            if parameter is not None
        }
        if masking.is_norm(module) and not isinstance(module, nn.GroupNorm):
            channels = left["weight"][0]
            if len(channels) < len(module.weight):
                masking.over_kept_channels(module, channels)
            continue
        for key, dims in left.items():
            parameter = module._parameters[key]
            for dim, channels in enumerate(dims):
                gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
                gone[channels] = False
                with torch.no_grad():
                    parameter.index_fill_(dim, gone.nonzero().view(-1), 0.0)
    return model


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
    return model


def assert_same_as_masked(original: Any, pruned: Any, inputs: dict[str, torch.Tensor]) -> None:
    reference = masked(original, pruned)
    take_scales(reference, pruned)
    masking.take_head_dims(reference, pruned)
    if small.TRANSFORMERS < (5,) and original.config.model_type in ("gemma", "gemma2"):
        # it scales embeddings by the config's hidden size as it runs
        factor = (pruned.config.hidden_size / original.config.hidden_size) ** 0.5
        reference.model.embed_tokens.register_forward_hook(lambda *given: given[-1] * factor)
    with closed(reference, pruned):
        expected = masking.outputs(eager(reference), inputs)
    got = masking.outputs(eager(copy.deepcopy(pruned)), inputs)
    assert expected.keys() == got.keys()
    for name, value in got.items():
        full = masking.without_zero_channels(expected[name], value.shape[-1])
        assert full.shape == value.shape, f"{name}: {full.shape} != {value.shape}"
        error = ((value - full).norm() / full.norm()).item()
        assert error <= 1e-6, f"{name}: relative error {error:.1e}"  # norms compute in float32
