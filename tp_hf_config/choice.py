"""Which dependency graph to prune by: said to the hook and to ``pruner_kwargs`` alike."""

from __future__ import annotations

from typing import Literal, get_args

Graph = Literal["auto", "config", "trace"]


def check_graph(graph: object) -> None:
    """Refuse any other word.

    Raises:
        ValueError: ``graph`` is none of them.
    """
    if graph not in get_args(Graph):
        raise ValueError(f"graph={graph!r}: expected 'auto', 'config' or 'trace'")
