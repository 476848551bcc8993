"""Check the options that the hook, ``pruner_kwargs`` and ``plan`` have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

Graph = Literal["auto", "config"]
"""The dependency graph to prune by: both words mean the one that is made from the config."""

Gqa = Literal["query", "group"]
"""How grouped-query heads are pruned.

``"query"``: the same number of query heads from every group; ``"group"``: whole groups.
"""


def check_graph(graph: object) -> None:
    """Raise if ``graph`` is not one of the known words.

    Raises:
        ValueError: ``graph`` is neither ``"auto"`` nor ``"config"``.
    """
    if graph == "trace":
        raise ValueError(
            "graph='trace': no model is pruned by Torch-Pruning's trace, only by groups that "
            "experiments prove. Leave graph= out; tp_hf_config.prunable(model) lists what can be "
            "pruned"
        )
    if graph not in get_args(Graph):
        raise ValueError(f"graph={graph!r}: expected 'config' or 'auto', which mean the same")


def check_gqa(gqa: object) -> None:
    """Raise if ``gqa`` is neither ``None`` nor one of the known words.

    Raises:
        ValueError: ``gqa`` is not ``None``, ``"query"`` or ``"group"``.
    """
    if gqa is not None and gqa not in get_args(Gqa):
        raise ValueError(f"gqa={gqa!r}: expected 'query' or 'group'")


def heads_asked(prune_num_heads: bool | None, gqa: object, ratio: float = 0.0) -> bool:
    """Return whether attention heads are pruned.

    Args:
        prune_num_heads: what the user said; ``None``: prune heads if ``gqa`` or ``ratio`` is set.
        gqa: how grouped-query heads are pruned; ``None``: not said.
        ratio: the share of the heads to prune.

    Raises:
        ValueError: ``gqa`` is unknown, or ``gqa`` or ``ratio`` is set but ``prune_num_heads`` is
            False.
    """
    check_gqa(gqa)
    if prune_num_heads is False and (gqa or ratio):
        how = f"gqa={gqa!r}" if gqa else f"head_pruning_ratio={ratio:g}"
        raise ValueError(
            f"{how} says how attention heads go, and prune_num_heads=False that none goes: leave "
            "one of them out"
        )
    return bool(gqa or ratio) if prune_num_heads is None else prune_num_heads


def names_in(fields: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of config fields as a tuple; a single name may be given as a string."""
    return (fields,) if isinstance(fields, str) else tuple(fields)


def check_share(name: str, value: Any) -> None:
    """Raise if ``value`` is not a ratio; ``None`` counts as 0.

    Args:
        name: what the message calls the value.
        value: what the user gave.

    Raises:
        ValueError: ``value`` is not a number from 0 to 1.
    """
    try:
        share = 0.0 if value is None else float(value)
    except (TypeError, ValueError):
        share = math.nan
    if 0 <= share <= 1:
        return
    meant = f" ({share:g} % is {share / 100:g})" if 1 < share <= 100 else ""
    raise ValueError(f"{name}={value}: expected a share between 0 and 1{meant}")
