"""Make the arguments that a pruner's constructor needs for a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError, closest
from ..fieldmap.field_map import map_of
from ..fieldmap.model_view import WidthView
from ..forward.inputs import example_inputs, tensors_with_grad
from ..forward.run_recipe import MakeInputs
from ..graph.config_graph import ConfigGraph
from ..graph.prunable import said_along, said_handed, widths_of
from ..graph.pruner_access import GraphInputs
from ..graph.traced.selection import TracedView
from ..model.config_json import FieldPath, field_name
from ..model.locate import check_followable, find_pretrained
from .choices import Gqa, Graph, check_graph, check_share, heads_asked, names_in
from .pruner_arguments import MERGED, NEEDED, check_names, check_ratios, unwrapped_in, warn
from .requested import staying, wanted_by
from .selection import Chosen, Wanted, choose, multiples_of
from .selection import check_ratios as check_field_ratios

_ASKED = "asked for"


def pruner_kwargs(
    model: nn.Module,
    *,
    prune: str | Iterable[str] | None = None,
    ratios: Mapping[str, float] | None = None,
    graph: Graph = "auto",
    prune_num_heads: bool | None = None,
    gqa: Gqa | None = None,
    prune_head_dims: bool | None = None,
    round_to: int | None = None,
    make_inputs: MakeInputs | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Return arguments for a Torch-Pruning pruner of this model, learned from its class.

    They hold the dependency graph, the layers that must keep their width, head counts, fused layers
    if the graph is traced, and the rounding without which the class refuses the config. Every dict
    and list is new.

    Args:
        model: a ``PreTrainedModel``, or a module that contains exactly one.
        prune: config fields to prune (``"intermediate_size"``, or several). Default: every width
            inside the model except attention heads and numbers of experts; if the model is inside
            another module, also except the width of what it returns. Of widths that share a
            dimension, only the one that holds most of the model is pruned; the first report's
            notes name the others.
        ratios: config field -> ratio, where it is not the pruner's ``pruning_ratio``.
        graph: ``"config"``: groups made from the config and proved by experiment, without tracing;
            ``"trace"``: Torch-Pruning's trace, made safe; ``"auto"``: the config graph, and the
            trace only if no experiment can be made with the class.
        prune_num_heads: also prune whole attention heads, by the pruner's ``head_pruning_ratio``;
            default: if ``gqa`` is given.
        gqa: how grouped-query heads are pruned then. ``"query"``: the same number of query heads
            from every key/value group, key/value heads stay; ``"group"``: whole key/value groups.
            Default: query heads if a group has several.
        prune_head_dims: also prune the same number of dimensions of every head, by the pruner's
            ``pruning_ratio``. Default: in a traced graph, if the class has no other way to make the
            hidden size smaller (BERT).
        round_to: a multiple that widths keep, besides what the class requires.
        make_inputs: a function of a config that returns a forward pass's keyword arguments, for a
            class that the library cannot feed by itself: see :func:`~tp_hf_config.prunable`.
            The hook then uses it too.
        arguments: any other arguments of the pruner. Those that the model has a say in
            (``ignored_layers``, ``num_heads``, ``pruning_ratio_dict``, ...) are merged with what it
            needs, the others are passed on. A width stays if ``ignored_layers`` or
            ``root_module_types`` keep one of its layers, and a warning says so.

    Returns:
        Keyword arguments; pass them on with ``**``.

    Raises:
        UnsupportedModelError: there is not exactly one Hugging Face model that can be followed, a
            field or heads cannot be pruned (the message has the reason and the fields that can), or
            ``make_inputs`` raises or returns what the class does not run with.
        ValueError: ``graph`` or ``gqa`` is unknown, ``gqa`` is given but heads are not pruned, or a
            ratio is outside 0 to 1.
        TypeError: not a model, or an argument that no pruner has.
    """
    check_graph(graph)
    heads = heads_asked(prune_num_heads, gqa)
    check_names(arguments)
    check_ratios(arguments)
    for name, ratio in (ratios or {}).items():
        check_share(f"ratios: {name}", ratio)
    prefix, pretrained = find_pretrained(model)
    check_followable(pretrained)
    view = WidthView(pretrained, map_of(pretrained, make_inputs=make_inputs))
    fields = None if prune is None and ratios is None else names_in(prune or ratios or ())
    given = {**arguments, "round_to": round_to, "prune_num_heads": heads}
    if prune_head_dims is not None:
        given["prune_head_dims"] = prune_head_dims
    reason = _ASKED
    if graph != "trace":
        wanted = Wanted(fields, heads, gqa, bool(prune_head_dims), bool(prefix))
        result = _on_config_graph(model, view, prefix, wanted, graph == "config", ratios, given)
        if not isinstance(result, str):
            return result
        reason = result
    inputs = given.pop("example_inputs", None)
    if inputs is None:
        inputs = example_inputs(model, view.field_map.recipe, pretrained.config)
    elif not isinstance(inputs, Mapping):
        raise TypeError(
            f"example_inputs= is a {type(inputs).__name__}: expected a dict of the forward pass's "
            "arguments, as {'input_ids': ids}, or nothing, and some are made"
        )
    return _for_trace(
        model,
        pretrained,
        TracedView(pretrained, view.field_map),
        GraphInputs(inputs, None, f"traced graph: {reason}"),
        None if fields is None else list(fields),
        ratios,
        heads,
        prune_head_dims,
        round_to,
        given,
    )


def by_itself(
    model: nn.Module,
    arguments: Mapping[str, Any],
    must: bool,
    make_inputs: MakeInputs | None = None,
) -> dict[str, Any] | str:
    """Return arguments for a pruner that got none from ``pruner_kwargs``, or why to trace instead.

    If head dims are asked for but cannot be pruned, they stay and a warning says so.

    Args:
        model: what is pruned.
        arguments: those of the pruner's constructor.
        must: raise instead of returning a reason to trace.
        make_inputs: the user's function that makes inputs, if there is one.

    Raises:
        UnsupportedModelError: heads cannot be pruned, or no width is proved.
    """
    prefix, pretrained = find_pretrained(model)
    view = WidthView(pretrained, map_of(pretrained, make_inputs=make_inputs))
    wanted = wanted_by(arguments, bool(prefix))
    given = {name: arguments[name] for name in MERGED if name in arguments}
    try:
        result = _on_config_graph(model, view, prefix, wanted, must, None, given)
        if not wanted.head_dims or not isinstance(result, str):
            return result
        reason = result
    except UnsupportedModelError as error:
        if not wanted.head_dims:
            raise
        reason = str(error)
    without = replace(wanted, head_dims=False)
    result = _on_config_graph(model, view, prefix, without, must, None, given)
    if not isinstance(result, str) and not _cuts_heads(view, result["example_inputs"].graph):
        warn(f"prune_head_dims=True, but head dims stay: {reason}")
    return result


def _cuts_heads(view: WidthView, graph: ConfigGraph) -> bool:
    """True if layers that are split into heads lose outputs."""
    return any(
        view.field_map.splits_of(name)
        for group in graph.coupled
        for name in graph.outputs_of(group)
    )


def _graph_of(view: WidthView, chosen: Chosen, prefix: str) -> ConfigGraph:
    """Return the config graph of the chosen widths, with notes on the widths that stay."""
    groups = [group for width in chosen.widths for group in width.groups]
    heads = {width.fields for width in chosen.heads}
    notes = [*chosen.kept, *(f"{name} stays: {reason}" for name, reason in chosen.left.items())]
    multiples, recipe = multiples_of(view, chosen), view.field_map.recipe
    return ConfigGraph(view.model, groups, prefix, multiples, heads, notes, recipe.make_inputs)


def _on_config_graph(
    model: nn.Module,
    view: WidthView,
    prefix: str,
    wanted: Wanted,
    must: bool,
    ratios: Mapping[str, float] | None,
    given: Mapping[str, Any],
) -> dict[str, Any] | str:
    """Return arguments for a pruner on the config graph, or the reason to trace instead.

    Args:
        model: what is pruned.
        view: the Hugging Face model in it.
        prefix: that model's name in it.
        wanted: what the user asks for.
        must: raise instead of returning a reason.
        ratios: config field -> ratio.
        given: the pruner's own arguments, as the user gave them.
    """
    chosen = choose(view, replace(wanted, stays=staying(view, given)), must)
    if isinstance(chosen, str):
        return chosen
    for message in chosen.kept:
        warn(message)
    graph = _graph_of(view, chosen, prefix)
    fields = {field for fields in graph.fields for field in fields}
    why = f"config graph: {len(graph.coupled)} groups, each proved by permutation"
    why += said_along([name for width in chosen.widths for name in width.along])
    why += said_handed(name for width in chosen.widths for name in width.handed)
    if chosen.how:
        why += f"; heads: {chosen.how}"
    by_module: dict[Any, float] = {}
    names = {field_name(field): field for field in fields}
    check_field_ratios(chosen, ratios or {})
    for name, ratio in (ratios or {}).items():
        by_module.update(dict.fromkeys(graph.roots_of(names[name]), ratio))
    by_module |= given.get("pruning_ratio_dict") or {}
    heads = {module: count for _, module, count in view.head_layers()}
    arguments = {
        **given,
        "example_inputs": example_inputs(model, view.field_map.recipe, view.model.config),
        "output_transform": given.get("output_transform") or tensors_with_grad,
        "num_heads": {**heads, **(given.get("num_heads") or {})},
        "in_channel_groups": dict(given.get("in_channel_groups") or {}),
        "out_channel_groups": dict(given.get("out_channel_groups") or {}),
        "ignored_layers": _union(_around(model, view.model), given.get("ignored_layers")),
        **({"pruning_ratio_dict": by_module} if by_module else {}),
        # hook.steering rounds each group to what the class accepts
        "round_to": given.get("round_to") or 1,
    }
    return _handed_out(arguments, graph, why)


def _handed_out(made: dict[str, Any], graph: ConfigGraph | None, why: str) -> dict[str, Any]:
    """Return the arguments with the graph inside their example inputs.

    The inputs also keep what ``check_handed`` compares with what the pruner gets.
    """
    inputs = GraphInputs(made["example_inputs"], graph, why)
    inputs.handed = {name: made[name] for name in NEEDED if name in made}
    return {**made, "example_inputs": inputs}


def _union(first: Iterable[Any], second: Iterable[Any] | None) -> list[Any]:
    """Return the items of both, each once, compared by identity."""
    return list({id(item): item for item in (*first, *(second or ()))}.values())


def _for_trace(
    model: nn.Module,
    pretrained: nn.Module,
    view: TracedView,
    inputs: GraphInputs,
    wanted: list[str] | None,
    ratios: Mapping[str, float] | None,
    prune_num_heads: bool,
    prune_head_dims: bool | None,
    round_to: int | None,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Return arguments for a pruner on a traced graph.

    Raises:
        UnsupportedModelError: a trace cannot prune what the user asks for.
    """
    if prune_num_heads and not any(True for _ in view.head_layers()):
        raise UnsupportedModelError(
            f"{type(pretrained).__name__} splits nothing into attention heads that was seen, so "
            "none can be pruned. Leave prune_num_heads and gqa out."
        )
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
    by_module: dict[Any, float] = {}
    offered = sorted(map(field_name, selected))
    for name, ratio in (ratios or {}).items():
        if name not in offered:
            raise UnsupportedModelError(
                f"ratios={dict(ratios or {})}: {name} is not among the fields to prune "
                f"({', '.join(offered)}){closest(name, offered)}."
            )
        by_module.update(dict.fromkeys(view.layers_of(name), ratio))
    by_module |= given.get("pruning_ratio_dict") or {}
    ignored = view.ignored(selected, set(heads)) + _around(model, pretrained)
    arguments = {
        **given,
        "example_inputs": inputs,
        "output_transform": given.get("output_transform") or tensors_with_grad,
        "num_heads": {**heads, **(given.get("num_heads") or {})},
        "in_channel_groups": dict(given.get("in_channel_groups") or {}),
        "out_channel_groups": {
            **view.fused(selected),
            **heads,
            **(given.get("out_channel_groups") or {}),
        },
        "ignored_layers": _union(ignored, given.get("ignored_layers")),
        "unwrapped_parameters": [
            *view.bare_parameters(selected),
            *unwrapped_in(given.get("unwrapped_parameters")),
        ],
        "prune_num_heads": prune_num_heads,
        "prune_head_dims": prune_head_dims,
        **({"pruning_ratio_dict": by_module} if by_module else {}),
        **view.rounding(selected, coupled, round_to, prune_num_heads),
    }
    return _handed_out(arguments, None, inputs.why)


def _disproved(view: TracedView, wanted: list[str] | None) -> set[FieldPath]:
    """Return the fields whose units an experiment showed not to be interchangeable.

    No trace may cut them. Heads are left to Torch-Pruning's own bookkeeping.

    Raises:
        UnsupportedModelError: ``wanted`` names one of these fields.
    """
    heads = view.head_fields()
    reasons = {
        width.fields[0]: str(width.reason)
        for width in widths_of(view.model, view.field_map)
        if width.disproved and len(width.fields) == 1 and width.fields[0] not in heads
    }
    for field, reason in reasons.items():
        if field_name(field) in (wanted or ()):
            raise UnsupportedModelError(
                f"{type(view.model).__name__} cannot prune {field_name(field)}: {reason}. A traced "
                "graph would cut it all the same, and wrongly."
            )
    return set(reasons)


def _around(model: nn.Module, pretrained: nn.Module) -> list[nn.Module]:
    """Return the layers of a wrapper outside the Hugging Face model: no config describes them."""
    inside = set(pretrained.modules())
    return [
        module
        for module in model.modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    ]
