"""What a user asks of pruning, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .targets import Target

# how grouped heads are pruned: as many query heads from every group, or whole groups
Gqa = Literal["query", "group"]

INNER = "inner"  # instead of a field's name: the inner widths, of feed-forward layers and experts

# (final ratio, number of steps) -> the ratios from step 0 on
Scheduler = Callable[[float, int], Sequence[float]]


@dataclass(frozen=True)
class PruneSettings:
    """What a user asks of pruning; see :func:`~tp_hf_config.plan`."""

    # None: inner widths; in a class without them, every width inside the model
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
    target: str | None = None  # tools that the widths have to suit

    def __post_init__(self) -> None:
        ratio = self.head_pruning_ratio
        if not self.prune_num_heads and (self.gqa or ratio):
            how = f"gqa={self.gqa!r}" if self.gqa else f"head_pruning_ratio={ratio:g}"
            raise ValueError(
                f"{how} asks for attention heads to be pruned, but prune_num_heads=False keeps all "
                "of them. Leave one of the two out"
            )
        self.check_round_to(self.round_to)
        Target.of(self.target)  # raises

    def check_round_to(self, round_to: int | None) -> None:
        """Raise if both a target and ``round_to`` say what widths are multiples of."""
        if round_to is not None and self.target is not None:
            raise ValueError(
                f"round_to={round_to} and target={self.target!r}: both say what widths are "
                "multiples of. Leave one of the two out"
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
        if prune == INNER or (prune is None and ratios is None):
            names = None  # inner widths
        else:
            fields = prune or ratios or ()  # without prune=, ratios= names the fields
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
        """Replace fields that represent all layers by those that ``names_of`` returns for them."""
        prune = (
            None
            if self.prune is None
            else dict.fromkeys(n for p in self.prune for n in names_of(p))
        )
        ratios = {name: ratio for given, ratio in self.ratios.items() for name in names_of(given)}
        return replace(self, prune=None if prune is None else tuple(prune), ratios=ratios)

    def of_pruner(self) -> dict[str, Any]:
        """Return the settings that a pruner's constructor takes, without those that are None."""
        own = ("prune", "ratios", "gqa", "per_layer", "target")
        return {k: v for k, v in vars(self).items() if k not in own and v is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for ``json.dumps``, without the scheduler."""
        values = {**vars(self), "prune": None if self.prune is None else list(self.prune)}
        del values["iterative_pruning_ratio_scheduler"]
        return values
