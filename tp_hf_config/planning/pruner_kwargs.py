"""Make the arguments that a pruner's constructor needs for a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..arguments import Count, Share, check_arguments
from ..errors import UnsupportedModelError, warn
from ..fieldmap.model_view import ModelView, view_of
from ..forward.inputs import example_inputs
from ..forward.run_recipe import MakeInputs
from ..graph.config_graph import ConfigGraph
from ..graph.layer_fields import fields_named, layers_listed
from ..graph.prunable import note_on_states, note_on_unobserved
from ..graph.pruner_access import GraphCarrier, GraphInputs
from ..graph.standin import on_standin, standin_of
from ..model.config_json import field_name
from ..model.surroundings import same_random_state
from .pruner_arguments import MERGED, NEEDED, check_names, check_values
from .requested import staying, wanted_by, with_ratios
from .selection import Chosen, Wanted, check_ratios, choose
from .settings import Gqa, Layers, PruneSettings
from .unit_counts import multiples_of


@check_arguments
def pruner_kwargs(
    model: nn.Module,
    *,
    prune: str | Iterable[str] | None = None,
    ratios: Mapping[str, Share] | None = None,
    prune_num_heads: bool | None = None,
    gqa: Gqa | None = None,
    prune_head_dims: bool | None = None,
    round_to: Count | None = None,
    make_inputs: MakeInputs | None = None,
    layers: Layers = "uniform",
    **arguments: Any,
) -> dict[str, Any]:
    """Return arguments for a Torch-Pruning pruner of this model, learned from its class.

    They hold the dependency graph, the layers that must keep their width, and head counts. Every
    dict and list is new.

    Args:
        model: a ``PreTrainedModel``, or a module that contains exactly one. A model under FSDP2 is
            read by every rank at the same time, for a hook with ``rebuild=``.
        prune: config fields to prune (``"intermediate_size"``, or several). Default: the fields
            that ``ratios`` names; without ``ratios``, what costs least: the inner widths of
            feed-forward layers and experts, and what ``pruning_ratio_dict`` names a layer of. Of a
            class without inner widths it is every width inside the model except attention heads,
            head dims and numbers of experts; if the model is inside another module, also except the
            width of what it returns. Of widths that share a dimension, only the one that holds most
            of the model is pruned; the first report's notes name the others.
        ratios: config field -> ratio. Fields of ``prune`` that are not here get the pruner's
            ``pruning_ratio``.
        prune_num_heads: also prune whole attention heads, by the pruner's ``head_pruning_ratio``;
            default: if ``gqa`` is given.
        gqa: how grouped-query heads are pruned then. ``"query"``: the same number of query heads
            from every key/value group, key/value heads stay; ``"group"``: whole key/value groups.
            Default: query heads if a group has several.
        prune_head_dims: also prune the same number of dimensions of every head, by the pruner's
            ``pruning_ratio``.
        round_to: a multiple that widths keep, besides what the class requires.
        make_inputs: a function of a config that returns a forward pass's keyword arguments, for a
            class that the library cannot feed by itself: see :func:`~tp_hf_config.prunable`.
            The hook then uses it too.
        layers: ``"differ"``: every layer may get widths of its own; for a hook with the same.
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
        ValueError: ``layers`` or ``gqa`` is unknown, ``gqa`` is given but heads are not
            pruned, a ratio is outside 0 to 1, or ``prune`` is empty and no heads are pruned.
        TypeError: not a model, or an argument that no pruner has.
    """
    model, arguments = standin_of(model), on_standin(model, arguments)
    check_names(arguments)
    check_values(arguments)
    settings = PruneSettings.of(prune, ratios or None, prune_num_heads, gqa, layers=layers)
    heads = settings.prune_num_heads
    given = {**arguments, "round_to": round_to, "prune_num_heads": heads}
    if prune_head_dims is not None:
        given["prune_head_dims"] = prune_head_dims
    with layers_listed(model, layers):
        view = view_of(model, make_inputs)
        settings = settings.in_every_layer(fields_named(view.field_map))
        wanted = Wanted(settings.prune, heads, gqa, bool(prune_head_dims), bool(view.prefix))
        return _on_config_graph(model, view, wanted, settings.ratios, given)


def default_pruner_kwargs(
    model: nn.Module, view: ModelView, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments for a pruner that got none from ``pruner_kwargs``.

    If head dims are asked for but cannot be pruned, they stay and a warning says so.

    Raises:
        UnsupportedModelError: heads cannot be pruned, or no width is proved.
    """
    wanted = wanted_by(arguments, bool(view.prefix))
    given = {name: arguments[name] for name in MERGED if name in arguments}
    try:
        return _on_config_graph(model, view, wanted, {}, given)
    except UnsupportedModelError as error:
        if not wanted.head_dims:
            raise
        reason = str(error)
    without = replace(wanted, head_dims=False)
    result = _on_config_graph(model, view, without, {}, given)
    graph = result["example_inputs"].graph
    shrinking = (name for group in graph.graph_groups for name in graph.outputs_of(group))
    if not any(map(view.field_map.splits_of, shrinking)):
        warn(f"prune_head_dims=True, but head dims stay: {reason}")
    return result


def _graph_of(view: ModelView, chosen: Chosen) -> ConfigGraph:
    """Return the config graph of the chosen widths, with notes on the widths that stay."""
    groups = [group for width in chosen.widths for group in width.groups]
    heads = {width.fields for width in chosen.heads}
    notes = [
        *chosen.staying,
        *(f"{name} stays: {reason}" for name, reason in chosen.left_out.items()),
    ]
    multiples, recipe = multiples_of(view, chosen.widths), view.field_map.recipe
    return ConfigGraph(view.model, groups, view.prefix, multiples, heads, notes, recipe.make_inputs)


def _on_config_graph(
    model: nn.Module,
    view: ModelView,
    wanted: Wanted,
    ratios: Mapping[str, float],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Return arguments for a pruner on the config graph.

    ``ratios``: config field -> ratio.
    ``given``: the pruner's own arguments that the user gave.
    """
    if wanted.fields is None:
        rooted = bool(given.get("root_module_types"))
        wanted = replace(wanted, with_ratio=with_ratios(view, given), rooted=rooted)
    chosen = choose(view, replace(wanted, stays=staying(view, given)))
    for message in chosen.staying:
        warn(message)
    graph = _graph_of(view, chosen)
    why = f"config graph: {len(graph.graph_groups)} groups, each proved by permutation"
    why += note_on_unobserved([n for width in chosen.widths for n in width.unobserved_parameters])
    why += note_on_states(name for width in chosen.widths for name in width.encoder_states)
    why += f"; heads: {chosen.how}" if chosen.how else ""
    by_module: dict[Any, float] = {}
    names = {field_name(field): field for fields in graph.fields for field in fields}
    check_ratios(chosen, ratios)
    for name, ratio in ratios.items():
        by_module.update(dict.fromkeys(graph.roots_of(names[name]), ratio))
    by_module |= given.get("pruning_ratio_dict") or {}
    heads = {module: count for _, module, count in view.head_layers()}
    ignored = (*_layers_outside(model, view.model), *(given.get("ignored_layers") or ()))
    with same_random_state():
        examples = example_inputs(model, view.field_map.recipe, view.model.config)
    inputs = GraphInputs(examples, graph, why)
    arguments = {
        **given,
        "example_inputs": inputs,
        "num_heads": {**heads, **(given.get("num_heads") or {})},
        "in_channel_groups": {**(given.get("in_channel_groups") or {}), GraphCarrier(inputs): 1},
        "out_channel_groups": dict(given.get("out_channel_groups") or {}),
        "ignored_layers": list({id(layer): layer for layer in ignored}.values()),
        **({"pruning_ratio_dict": by_module} if by_module else {}),
        # hook.unit_choice rounds each group to what the class accepts
        "round_to": given.get("round_to") or 1,
    }
    inputs.needed = {name: arguments[name] for name in NEEDED if name in arguments}
    return arguments


def _layers_outside(model: nn.Module, pretrained: nn.Module) -> list[nn.Module]:
    """Return the layers of a wrapper outside the Hugging Face model: no config describes them."""
    inside = set(pretrained.modules())
    return [
        module
        for module in model.modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    ]
