"""Did the right units go?  The pruned model must equal the original with those units at zero.

Shapes cannot tell: a layer that lost the wrong channels, or regrouped heads, has the shapes that
its config asks for.  Here the *original* model, at full width, has the removed units' weights set
to zero and its norms taken over the kept channels only, and must compute what the pruned one does.

The library is used for one thing, its record of which channels went.  That is checked too: every
pruned tensor must hold exactly the original's values at the channels that are said to be left.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import small
import torch
from torch import nn

from tp_hf_config.forward.observed_pass import AllFloat64

OUT, IN = True, False
_EXACT = 1e-9
# RMS norms and T5's and eager softmaxes compute in float32 whatever the model's dtype: inputs that
# differ in the 16th digit can be rounded to neighbouring float32 values, 6e-8 apart, and each layer
# passes that on. A wrong unit changes the outputs in the first digit.
_WITH_FLOAT32_INSIDE = 1e-6


@dataclass
class Removed:
    """What is left of every layer, in the numbering of the unpruned model.

    Attributes:
        kept: (layer or bare parameter, side) -> original channels that are left, in order.
        size: the same keys -> how many there were.
    """

    kept: dict[tuple[str, bool], list[int]] = field(default_factory=dict)
    size: dict[tuple[str, bool], int] = field(default_factory=dict)

    def left(self, name: str, side: bool, size: int) -> torch.Tensor:
        """The channels that are left of a layer's side; all of them where none was pruned."""
        assert self.size.get((name, side), size) == size, f"{name} has {size} channels"
        return torch.tensor(self.kept.get((name, side), list(range(size))))


def removed_by(reports: Iterable[Any], original: nn.Module) -> Removed:
    """Compose what the hook's reports recorded, group after group, into original channels."""
    names = {name for name, _ in original.named_modules()}
    names |= {name for name, _ in original.named_parameters(remove_duplicate=False)}
    found = Removed()
    for report in reports:
        for group in report.groups:
            seen: dict[tuple[str, bool], set[int]] = {}
            for layer in group.layers:
                if layer.name in names:  # else one of the graph's own nodes: an addition, a split
                    seen.setdefault((layer.name, layer.out), set()).update(layer.removed)
                    found.size.setdefault((layer.name, layer.out), layer.before)
            for layer in group.layers:
                key = (layer.name, layer.out)
                if key in seen:
                    kept = found.kept.setdefault(key, list(range(layer.before)))
                    gone = seen.pop(key)
                    assert layer.before == len(kept), f"{key}: {layer.before} != {len(kept)}"
                    assert gone <= set(range(layer.before)), f"{key}: there is no {max(gone)}"
                    found.kept[key] = [c for i, c in enumerate(kept) if i not in gone]
    _follow_ties(found, original)
    return found


def _follow_ties(found: Removed, original: nn.Module) -> None:
    """An embedding that no forward pass calls (T5's ``shared``) goes with those it is tied to."""
    every = original.named_modules(remove_duplicate=False)  # one module for all, in Transformers 4
    tables = [(n, m) for n, m in every if isinstance(m, nn.Embedding)]
    for name, table in tables:
        for other, twin in tables:
            if twin.weight is table.weight and (other, OUT) in found.kept:
                found.kept.setdefault((name, OUT), found.kept[other, OUT])
                found.size.setdefault((name, OUT), found.size[other, OUT])


def assert_values_kept(original: nn.Module, pruned: nn.Module, removed: Removed) -> None:
    """Every tensor of the pruned model is the original's, at the channels that are left."""
    layers = dict(original.named_modules(remove_duplicate=False))
    after = dict(pruned.named_parameters(remove_duplicate=False))
    before = dict(original.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    for name, parameter in before.items():
        owner, _, key = name.rpartition(".")
        expected = parameter
        for dim, channels in _left(layers[owner], owner, key, parameter, removed):
            expected = expected.index_select(dim, channels)
        got = after[name]
        assert got.shape == expected.shape, f"{name}: {got.shape}, expected {expected.shape}"
        assert torch.equal(got, expected), f"{name}: other values than at the channels left"


def assert_same_as_masked(
    original: nn.Module,
    pruned: nn.Module,
    reports: Iterable[Any],
    inputs: Mapping[str, torch.Tensor],
    narrow: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """The pruned model computes what the original does with the removed units at zero.

    Args:
        original: a deepcopy made before pruning.
        pruned: the model after pruning, its config brought in step.
        reports: the hook's reports, all of them.
        inputs: for one forward pass.
        narrow: those of the pruned model, where they are others.
    """
    removed = removed_by(reports, original)
    assert_values_kept(original, pruned, removed)
    masked = masked_copy(original, removed).double()
    pruned = copy.deepcopy(pruned).double()
    take_scales(masked, pruned)
    if small.TRANSFORMERS < (5,):
        take_head_dims(masked, pruned)
    expected, got = outputs(masked, inputs), outputs(pruned, narrow or inputs)
    assert expected.keys() == got.keys()
    tolerance = _WITH_FLOAT32_INSIDE if computes_in_float32(original) else _EXACT
    for name, value in got.items():
        reference = without_zero_channels(expected[name], value.shape[-1])
        assert reference.shape == value.shape, f"{name}: {reference.shape} != {value.shape}"
        error = ((value - reference).norm() / reference.norm()).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}, allowed {tolerance:.0e}"


def masked_copy(original: nn.Module, removed: Removed) -> nn.Module:
    """The original at full width, with the removed units at zero."""
    model = copy.deepcopy(original)
    for name, module in list(model.named_modules()):
        for key, parameter in module._parameters.items():
            if parameter is None or is_norm(module):
                continue
            for dim, left in _left(module, name, key, parameter, removed):
                gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
                gone[left] = False
                with torch.no_grad():
                    parameter.index_fill_(dim, gone.nonzero().view(-1), 0.0)
        if is_norm(module):
            left = _norm_left(module, name, removed)
            if len(left) < len(module.weight):
                over_kept_channels(module, left)
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


def computes_in_float32(model: nn.Module) -> bool:
    """Whether some norm is a class of Transformers' own; those compute in float32."""
    return any(is_norm(m) and not isinstance(m, nn.LayerNorm) for m in model.modules())


def take_scales(masked: nn.Module, pruned: nn.Module) -> None:
    """Scale factors that depend on widths, as the class computes them for the pruned widths.

    Read from a model freshly built from the pruned config (whose values the tests write out), not
    from the live model: a factor that the hook forgot to refresh shows as a difference.
    """
    fresh = dict(type(pruned)(copy.deepcopy(pruned.config)).named_modules())
    for name, module in masked.named_modules():
        for key in ("scaling", "scale", "model_dim"):
            if isinstance(vars(module).get(key), (int, float)):
                setattr(module, key, getattr(fresh[name], key))
        if "embed_scale" in module._buffers:
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
        if small.TRANSFORMERS < (5,):  # BERT, DistilBERT and GPT-2 read it off too
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


def outputs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The floating-point tensors that a model returns; caches are left out."""
    dtype = next(model.parameters()).dtype
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    # DeepSeek-V3 of Transformers 4 does not run in float64 but for this
    double = AllFloat64() if small.TRANSFORMERS < (5,) else contextlib.nullcontext()
    with torch.no_grad(), double:
        result = model(**cast)
    return {k: v for k, v in result.items() if isinstance(v, torch.Tensor)}


def without_zero_channels(value: torch.Tensor, width: int) -> torch.Tensor:
    """A hidden state without the channels that are zero for every input, where it is too wide."""
    if value.shape[-1] == width:
        return value
    return value[..., (value != 0).flatten(0, -2).any(0)]


def _left(
    module: nn.Module,
    name: str,
    key: str,
    parameter: torch.Tensor,
    removed: Removed,
) -> list[tuple[int, torch.Tensor]]:
    """For each dimension of a parameter that was cut: the original positions that are left."""
    path = f"{name}.{key}" if name else key
    sides: list[tuple[int, str, bool]] = []
    if (path, OUT) in removed.kept:  # pruned as a bare parameter: its last dimension
        sides = [(parameter.ndim - 1, path, OUT)]
    elif isinstance(module, nn.Embedding):
        sides = [(1, name, OUT)]
    elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        sides = [(0, name, OUT)] if key == "bias" else [(0, name, OUT), (1, name, IN)]
    elif isinstance(module, nn.LayerNorm):
        sides = [(0, name, OUT)]
    return [
        (dim, removed.left(layer, side, parameter.shape[dim]))
        for dim, layer, side in sides
        if (layer, side) in removed.kept
    ]


def _norm_left(module: nn.Module, name: str, removed: Removed) -> torch.Tensor:
    size = len(module.weight)
    key = f"{name}.weight" if (f"{name}.weight", OUT) in removed.kept else name
    return removed.left(key, OUT, size)


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
    axis = 1 if getattr(norm, "data_format", "") == "channels_first" else -1

    def forward(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        cut = [one.index_select(axis, left) for one in (x, *others)]
        return torch.zeros_like(x).index_copy_(axis, left, narrow(*cut))

    norm.forward = forward
