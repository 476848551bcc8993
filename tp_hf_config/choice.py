"""Words of the user's choice, said to the hook, to ``pruner_kwargs`` and to ``plan`` alike."""

from __future__ import annotations

from typing import Literal, get_args

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
