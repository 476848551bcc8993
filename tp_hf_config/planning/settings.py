"""Define what a user asks of pruning, and check it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Gqa = Literal["query", "group"]
"""How grouped-query heads are pruned.

``"query"``: the same number of query heads from every group; ``"group"``: whole groups.
"""

INNER = "inner"
"""In the place of a field's name: the inner widths, of feed-forward layers and experts."""

Scheduler = Callable[[float, int], Sequence[float]]
"""The final ratio, number of steps -> the ratios from step 0 on."""


@dataclass(frozen=True)
class PruneSettings:
    """What a user asks of pruning: the arguments of ``plan`` of the same names.

    Attributes:
        prune: names of config fields; ``None``: inner widths; where there are none, every width
            inside the model.
        ratios: config field -> its own ratio.
        prune_num_heads: whether attention heads are pruned.
        per_layer: whether each layer may get widths of its own.

    Raises:
        ValueError: heads are ruled out although ``gqa`` or ``head_pruning_ratio`` is set.
    """

    prune: tuple[str, ...] | None = None
    pruning_ratio: float = 0.5
    ratios: dict[str, float] = field(default_factory=dict)
    prune_num_heads: bool = False
    gqa: Gqa | None = None
    head_pruning_ratio: float = 0.0
    iterative_steps: int = 1
    round_to: int | None = None
    max_pruning_ratio: float = 1.0
    iterative_pruning_ratio_scheduler: Scheduler | None = None
    per_layer: bool = False

    def __post_init__(self) -> None:
        ratio = self.head_pruning_ratio
        if not self.prune_num_heads and (self.gqa or ratio):
            how = f"gqa={self.gqa!r}" if self.gqa else f"head_pruning_ratio={ratio:g}"
            raise ValueError(
                f"{how} says how attention heads go, and prune_num_heads=False that none goes: "
                "leave one of them out"
            )

    @classmethod
    def of(
        cls,
        prune: str | Iterable[str] | None,
        ratios: Mapping[str, float] | None,
        prune_num_heads: bool | None,
        gqa: Gqa | None,
        head_pruning_ratio: float = 0.0,
        **others: Any,
    ) -> PruneSettings:
        """Return the settings that a user's arguments mean.

        Args:
            prune: config fields, or one; ``None``: those that ``ratios`` names, if it is given;
                ``"inner"``: inner widths.
            ratios: config field -> ratio.
            prune_num_heads: ``None``: prune heads if ``gqa`` or ``head_pruning_ratio`` is set.
            gqa: as in ``plan``.
            head_pruning_ratio: as in ``plan``.
            others: the other attributes.
        """
        if prune == INNER or (prune is None and ratios is None):
            names = None
        else:
            fields = prune or ratios or ()
            names = (fields,) if isinstance(fields, str) else tuple(fields)
        if prune_num_heads is None:
            prune_num_heads = bool(gqa or head_pruning_ratio)
        return cls(
            prune=names,
            ratios=dict(ratios or {}),
            prune_num_heads=prune_num_heads,
            gqa=gqa,
            head_pruning_ratio=head_pruning_ratio,
            **others,
        )

    def in_every_layer(self, names_of: Callable[[str], Sequence[str]]) -> PruneSettings:
        """Return the settings with a field of every layer for one that all layers stand for.

        ``names_of``: a field's name -> the names of the fields that it stands for.
        """
        prune = (
            None
            if self.prune is None
            else dict.fromkeys(n for p in self.prune for n in names_of(p))
        )
        ratios = {name: ratio for given, ratio in self.ratios.items() for name in names_of(given)}
        return replace(self, prune=None if prune is None else tuple(prune), ratios=ratios)

    def of_pruner(self) -> dict[str, Any]:
        """Return the settings that are arguments of a pruner, without those that say nothing."""
        own = ("prune", "ratios", "gqa", "per_layer")
        return {k: v for k, v in vars(self).items() if k not in own and v is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, without the scheduler, as a dict for ``json.dumps``."""
        values = {**vars(self), "prune": None if self.prune is None else list(self.prune)}
        del values["iterative_pruning_ratio_scheduler"]
        return values
