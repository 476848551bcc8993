"""What a pruner's constructor has to be told about a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd, lcm
from typing import TYPE_CHECKING, Any

from torch import nn

from .choice import Graph, check_graph
from .errors import UnsupportedModelError
from .graph import ConfigGraph
from .inputs import example_inputs, tensors_with_grad
from .learn import map_of
from .limits import multiple_of
from .locate import check_followable, find_pretrained
from .offers import Width, widths_of
from .reference import FieldPath, field_name
from .steer import GraphInputs
from .ties import tensor
from .widths import WidthView

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pruner_kwargs(
    model: nn.Module,
    *,
    prune: Iterable[str] | None = None,
    ratios: Mapping[str, float] | None = None,
    graph: Graph = "auto",
    prune_num_heads: bool = False,
    prune_head_dims: bool | None = None,
    round_to: int | None = None,
) -> dict[str, Any]:
    """Arguments for a Torch-Pruning pruner of this model, learned from its class.

    They name the dependency graph, the layers that must keep their width, head counts and fused
    layers where the graph is traced, and the rounding without which the class refuses the config.
    Every dict and list is fresh.

    Args:
        model: a ``PreTrainedModel``, or a module that contains exactly one.
        prune: config fields to prune (``("intermediate_size",)``); default: every width inside the
            model but attention heads and numbers of experts.
        ratios: pruning ratio per config field, where it is not the pruner's ``pruning_ratio``.
        graph: ``"config"``: groups made from the config and proved by experiment, no tracing;
            ``"trace"``: Torch-Pruning's trace, made safe; ``"auto"``: the former where all that
            is to be pruned is proved, else the latter.
        prune_num_heads: whole attention heads are going to be pruned by Torch-Pruning's
            ``head_pruning_ratio``; this needs the traced graph.
        prune_head_dims: in the traced graph, the same number of dimensions of every head is going
            to be pruned. By default only where the class has no other way to make the hidden size
            smaller (BERT).
        round_to: a multiple that widths shall have besides what the class asks for.

    Returns:
        Keyword arguments; pass them on with ``**``.

    Raises:
        UnsupportedModelError: no single followable Hugging Face model, or a field that cannot be
            pruned, with the reason and the fields that can.
        ValueError: an unknown ``graph``.
    """
    check_graph(graph)
    prefix, pretrained = find_pretrained(model)
    check_followable(pretrained)
    view = WidthView(pretrained, map_of(pretrained))
    wanted = None if prune is None else list(prune)
    if wanted is None and ratios is not None:
        wanted = list(ratios)
    why = "asked for"
    if prune_num_heads or prune_head_dims:
        why = "head ratios need the traced graph"
        if graph == "config":
            raise UnsupportedModelError(
                f"graph='config' with {'prune_num_heads' if prune_num_heads else 'prune_head_dims'}"
                "=True: Torch-Pruning's head ratios need its traced graph. Name the field that "
                "counts the heads in prune= instead."
            )
    elif graph != "trace":
        chosen = _proved_widths(view, wanted, must=graph == "config")
        if not isinstance(chosen, str):
            multiples = {width.fields: _multiple(view, width) for width in chosen}
            groups = [group for width in chosen for group in width.groups]
            made = ConfigGraph(pretrained, groups, prefix, multiples)
            return _for_config_graph(model, pretrained, made, ratios, round_to)
        why = chosen
    inputs = GraphInputs(example_inputs(model, pretrained.config), None, f"traced graph: {why}")
    return _for_trace(
        model, pretrained, view, inputs, wanted, ratios, prune_num_heads, prune_head_dims, round_to
    )


def _multiple(view: WidthView, width: Width) -> int:
    """What a width has to stay a multiple of: the class asks for it, or its kernels do.

    Stacked experts run in a grouped matrix product that takes rows of whole 16 bytes only.
    """
    known = view.known
    multiple = 1
    if len(width.fields) == 1 and not set(width.fields) & known.count_fields():
        multiple = multiple_of(known, width.fields[0])
    for group in width.groups:
        own = group.classes  # all groups of one width lose the same number
        for member in group.members:
            parameter = tensor(view.model, member.name)
            owner = view.model.get_submodule(member.name.rpartition(".")[0])
            if parameter.ndim == 3 and member.dim > 0 and not isinstance(owner, nn.Conv1d):
                own = lcm(own, 16 // parameter.element_size())
        multiple = lcm(multiple, own // gcd(own, group.grain))
    return multiple


def _proved_widths(view: WidthView, wanted: list[str] | None, must: bool) -> list[Width] | str:
    """The widths to prune by the config graph, or why it is left to the trace."""
    widths = widths_of(view.model)
    by_field: dict[str, list[Width]] = {}
    for width in widths:
        for path in width.fields:
            by_field.setdefault(field_name(path), []).append(width)
    if wanted is None:
        inner = view.inner_widths()
        default = [width for width in widths if inner >= set(width.fields)]
        proved: list[Width] = []
        for width in default:
            if width.reason is None and not any(set(width.fields) & set(w.fields) for w in proved):
                proved.append(width)
        if proved:
            return proved
        reason = "; ".join(f"{w.name}: {w.reason}" for w in default) or "no width inside the model"
        if must or any(width.disproved for width in default):
            raise UnsupportedModelError(
                f"{type(view.model).__name__}: nothing is proved. {reason}."
            )
        return reason
    chosen: list[Width] = []
    named = set(wanted)
    for name in wanted:
        candidates = by_field.get(name, [])
        found = [width for width in candidates if width.reason is None]
        # of several, one whose fields are all named, and the one that holds most of those
        found.sort(key=lambda one: (not named >= set(one.names), -len(named & set(one.names))))
        if not found:
            reasons = sorted({str(width.reason) for width in candidates}) or ["no such width"]
            reason = f"{name}: {'; '.join(reasons)}"
            if not must and not any(width.disproved for width in candidates):
                return reason
            offered = ", ".join(w.name for w in widths if w.reason is None)
            raise UnsupportedModelError(
                f"{type(view.model).__name__} cannot prune {reason}. Widths that can: {offered}."
            )
        chosen += [width for width in found[:1] if width not in chosen]
    _check_apart(view, chosen)
    return chosen


def _check_apart(view: WidthView, chosen: list[Width]) -> None:
    """Two widths that share a dimension (heads times head dim) cannot go in one pruner."""
    owner: dict[tuple[str, int], Width] = {}
    for width in chosen:
        for member in (member for group in width.groups for member in group.members):
            other = owner.setdefault((member.name, member.dim), width)
            if other is not width:
                raise UnsupportedModelError(
                    f"{type(view.model).__name__}: {other.name} and {width.name} both set "
                    f"dimension {member.dim} of {member.name}. Prune them one after the other, "
                    "each with a pruner of its own."
                )


def _for_config_graph(
    model: nn.Module,
    pretrained: PreTrainedModel,
    graph: ConfigGraph,
    ratios: Mapping[str, float] | None,
    round_to: int | None,
) -> dict[str, Any]:
    fields = {path for fields in graph.fields for path in fields}
    why = f"config graph: {len(graph.coupled)} groups, each proved by permutation"
    by_module: dict[Any, float] = {}
    names = {field_name(path): path for path in fields}
    for name, ratio in (ratios or {}).items():
        if name not in names:
            raise UnsupportedModelError(
                f"ratios={dict(ratios or {})}: {name} is not among the fields to prune "
                f"({', '.join(sorted(names))})."
            )
        by_module.update(dict.fromkeys(graph.roots_of(names[name]), ratio))
    return {
        "example_inputs": GraphInputs(example_inputs(model, pretrained.config), graph, why),
        "output_transform": tensors_with_grad,
        "num_heads": {},
        "in_channel_groups": {},
        "out_channel_groups": {},
        "ignored_layers": _around(model, pretrained),
        **({"pruning_ratio_dict": by_module} if by_module else {}),
        "round_to": round_to or 1,  # every group rounds to what the class takes (steer.py)
    }


def _for_trace(
    model: nn.Module,
    pretrained: nn.Module,
    view: WidthView,
    inputs: GraphInputs,
    wanted: list[str] | None,
    ratios: Mapping[str, float] | None,
    prune_num_heads: bool,
    prune_head_dims: bool | None,
    round_to: int | None,
) -> dict[str, Any]:
    selected = view.select(wanted, prune_num_heads) - _disproved(view, wanted)
    coupled = view.coupled(selected)
    if prune_head_dims is None:
        prune_head_dims = bool(coupled) and not prune_num_heads
    if prune_head_dims and view.rotates_head_dims():
        raise UnsupportedModelError(
            f"{type(pretrained).__name__} encodes positions in its head dims (its position tables "
            "are as wide as a head), so they are not interchangeable. Leave prune_head_dims out, "
            "or prune whole heads (prune_num_heads=True)."
        )
    use_heads = prune_num_heads or prune_head_dims
    heads = {
        module: count
        for name, module, count in view.head_layers()
        if use_heads and view.plain_heads(name)
    }
    by_module: dict[nn.Module, float] = {}
    for name, ratio in (ratios or {}).items():
        by_module.update(dict.fromkeys(view.layers_of(name), ratio))
    return {
        "example_inputs": inputs,
        "output_transform": tensors_with_grad,
        "num_heads": heads,
        "in_channel_groups": {},
        "out_channel_groups": {**view.fused(selected), **heads},
        "ignored_layers": view.ignored(selected, set(heads)) + _around(model, pretrained),
        "unwrapped_parameters": view.bare_parameters(selected),
        "prune_num_heads": prune_num_heads,
        "prune_head_dims": prune_head_dims,
        **({"pruning_ratio_dict": by_module} if by_module else {}),
        **view.rounding(selected, coupled, round_to, prune_num_heads),
    }


def _disproved(view: WidthView, wanted: list[str] | None) -> set[FieldPath]:
    """Widths whose units an experiment showed not to be interchangeable: no trace may cut them.

    Heads are left to Torch-Pruning's own bookkeeping.
    """
    heads = view.head_fields()
    found = {
        width.fields[0]: str(width.reason)
        for width in widths_of(view.model)
        if width.disproved and len(width.fields) == 1 and width.fields[0] not in heads
    }
    for path, reason in found.items():
        if field_name(path) in (wanted or ()):
            raise UnsupportedModelError(
                f"{type(view.model).__name__} cannot prune {field_name(path)}: {reason}. A traced "
                "graph would cut it all the same, and wrongly."
            )
    return set(found)


def _around(model: nn.Module, pretrained: nn.Module) -> list[nn.Module]:
    """Layers of a wrapper outside the Hugging Face model in it: no config speaks of them."""
    inside = set(pretrained.modules())
    return [
        module
        for module in model.modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    ]
