"""What a pruner's constructor has to be told about a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .choice import Gqa, Graph, check_gqa, check_graph
from .chosen import Chosen, Wanted, check_ratios, choose, multiples_of
from .errors import UnsupportedModelError
from .graph import ConfigGraph
from .inputs import example_inputs, tensors_with_grad
from .learn import map_of
from .locate import check_followable, find_pretrained
from .offers import said_along, said_handed, widths_of
from .reference import FieldPath, field_name
from .steer import GraphInputs
from .widths import WidthView

_ASKED = "asked for"


def pruner_kwargs(
    model: nn.Module,
    *,
    prune: Iterable[str] | None = None,
    ratios: Mapping[str, float] | None = None,
    graph: Graph = "auto",
    prune_num_heads: bool = False,
    gqa: Gqa | None = None,
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
            model but attention heads and numbers of experts, and, where the model is inside
            another module, but the width of what it returns. Of widths that share a dimension, the
            one that holds most of the model; the first report's notes name the others.
        ratios: pruning ratio per config field, where it is not the pruner's ``pruning_ratio``.
        graph: ``"config"``: groups made from the config and proved by experiment, no tracing;
            ``"trace"``: Torch-Pruning's trace, made safe; ``"auto"``: the former, the latter
            only where no experiment can be made with the class.
        prune_num_heads: whole attention heads go too, by the pruner's ``head_pruning_ratio``.
        gqa: with it, how grouped-query heads go: ``"query"``: as many query heads out of every
            key/value group, key/value heads stay; ``"group"``: whole key/value groups. By default
            the first, where a group has several query heads.
        prune_head_dims: the same number of dimensions of every head goes too, by the pruner's
            ``pruning_ratio``. In the traced graph by default where the class has no other way to
            make the hidden size smaller (BERT).
        round_to: a multiple that widths shall have besides what the class asks for.

    Returns:
        Keyword arguments; pass them on with ``**``.

    Raises:
        UnsupportedModelError: no single followable Hugging Face model, or a field or heads that
            cannot be pruned, with the reason and the fields that can.
        ValueError: an unknown ``graph`` or ``gqa``.
    """
    check_graph(graph)
    check_gqa(gqa)
    prefix, pretrained = find_pretrained(model)
    check_followable(pretrained)
    view = WidthView(pretrained, map_of(pretrained))
    fields = None if prune is None and ratios is None else tuple(prune or ratios or ())
    why = _ASKED
    if graph != "trace":
        wanted = Wanted(fields, prune_num_heads, gqa, bool(prune_head_dims), bool(prefix))
        chosen = choose(view, wanted, must=graph == "config")
        if not isinstance(chosen, str):
            made = _graph_of(view, chosen, prefix)
            kwargs = _for_config_graph(model, view, made, chosen, ratios, round_to)
            return {**kwargs, "prune_num_heads": prune_num_heads}
        why = chosen
    inputs = GraphInputs(example_inputs(model, pretrained.config), None, f"traced graph: {why}")
    return _for_trace(
        model,
        pretrained,
        view,
        inputs,
        None if fields is None else list(fields),
        ratios,
        prune_num_heads,
        prune_head_dims,
        round_to,
    )


def _graph_of(view: WidthView, chosen: Chosen, prefix: str) -> ConfigGraph:
    groups = [group for width in chosen.widths for group in width.groups]
    heads = {width.fields for width in chosen.heads}
    notes = [f"{name} stays: {reason}" for name, reason in chosen.left.items()]
    return ConfigGraph(view.model, groups, prefix, multiples_of(view, chosen), heads, notes)


def _for_config_graph(
    model: nn.Module,
    view: WidthView,
    graph: ConfigGraph,
    chosen: Chosen,
    ratios: Mapping[str, float] | None,
    round_to: int | None,
) -> dict[str, Any]:
    fields = {path for fields in graph.fields for path in fields}
    why = f"config graph: {len(graph.coupled)} groups, each proved by permutation"
    why += said_along([name for width in chosen.widths for name in width.along])
    why += said_handed(name for width in chosen.widths for name in width.handed)
    if chosen.how:
        why += f"; heads: {chosen.how}"
    by_module: dict[Any, float] = {}
    names = {field_name(path): path for path in fields}
    check_ratios(chosen, ratios or {})
    for name, ratio in (ratios or {}).items():
        by_module.update(dict.fromkeys(graph.roots_of(names[name]), ratio))
    return {
        "example_inputs": GraphInputs(example_inputs(model, view.model.config), graph, why),
        "output_transform": tensors_with_grad,
        "num_heads": {module: count for _, module, count in view.head_layers()},
        "in_channel_groups": {},
        "out_channel_groups": {},
        "ignored_layers": _around(model, view.model),
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
    if prune_num_heads and not any(view.plain_heads(name) for name, _, _ in view.head_layers()):
        why = inputs.why.removeprefix("traced graph: ")
        way_out = (
            "Use graph='config', which takes the same head_pruning_ratio."
            if why == _ASKED
            else f"The graph made from the config cannot prune heads here either: {why}."
        )
        raise UnsupportedModelError(
            f"{type(pretrained).__name__}: Torch-Pruning's trace prunes grouped-query and fused "
            f"heads wrongly (its issues 495 and 516). {way_out}"
        )
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
        for width in widths_of(view.model, view.known)
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
