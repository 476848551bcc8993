"""Words of the user's choice, said to the hook, to ``pruner_kwargs`` and to ``plan`` alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, get_args

Graph = Literal["auto", "config", "trace"]
"""Which dependency graph to prune by."""

Gqa = Literal["query", "group"]
"""How grouped-query heads go: as many query heads out of every group, or whole groups."""


def check_graph(graph: object) -> None:
    """Refuse any other word.

    Raises:
        ValueError: ``graph`` is none of them.
    """
    if graph not in get_args(Graph):
        raise ValueError(f"graph={graph!r}: expected 'auto', 'config' or 'trace'")


def check_gqa(gqa: object) -> None:
    """Refuse any other word.

    Raises:
        ValueError: ``gqa`` is none of them.
    """
    if gqa is not None and gqa not in get_args(Gqa):
        raise ValueError(f"gqa={gqa!r}: expected 'query' or 'group'")


def heads_asked(prune_num_heads: bool | None, gqa: object, ratio: float = 0.0) -> bool:
    """Whether attention heads are pruned: said, or to be told from how they shall go.

    Raises:
        ValueError: an unknown ``gqa``, or how no heads shall go.
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
    """Names of config fields, of which one may stand alone."""
    return (fields,) if isinstance(fields, str) else tuple(fields)


def closest(name: str, known: Iterable[str]) -> str:
    """The name that is spelled most like one that is not known, behind another text."""
    return "".join(f" (did you mean {one}?)" for one in get_close_matches(name, list(known), n=1))


def check_share(name: str, value: Any) -> None:
    """Refuse what is no ratio.

    Raises:
        ValueError: a number outside 0 to 1, or none.
    """
    try:
        share = 0.0 if value is None else float(value)
    except (TypeError, ValueError):
        share = math.nan
    if 0 <= share <= 1:
        return
    meant = f" ({share:g} % is {share / 100:g})" if 1 < share <= 100 else ""
    raise ValueError(f"{name}={value}: expected a share between 0 and 1{meant}")
