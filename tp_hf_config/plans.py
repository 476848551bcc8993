"""A plan, as text, as a table and as JSON; what it is made of is computed in ``planning``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .choice import Gqa
from .errors import ConfigSyncError, UnsupportedModelError
from .learn import map_of
from .locate import find_pretrained
from .notebook import short
from .plan_table import described, html, refusal_lines, table, text
from .prepare import pruner_kwargs
from .reference import FieldPath
from .schema import dated
from .sizes import Size

Scheduler = Callable[[float, int], Sequence[float]]


@dataclass(frozen=True)
class PlannedWidth:
    """One width: what was asked, what it will be, what it could be.

    Attributes:
        name: its config fields as people write them.
        before: field -> value now.
        steps: field -> value, after each step.
        asked: the ratio asked for.
        reached: the share of the units that will be gone.
        reachable: the values that its first field can reach, as far as the class takes them with
            all other fields as they are.
        multiples: which of 64, 128 and 256 the pruned dimensions are multiples of, in every layer
            (of heads: their channels).
        ranks: over which of 2, 4 and 8 tensor-parallel ranks the fields divide; for heads, the
            query and the key/value heads.
        parameters: how many parameters one unit holds.
    """

    name: str
    before: dict[str, int]
    steps: tuple[dict[str, int], ...]
    asked: float
    reached: float
    reachable: Sequence[int]
    multiples: tuple[int, ...]
    ranks: tuple[int, ...]
    parameters: int

    def __repr__(self) -> str:
        ways = (f"{name}: {old:,} -> {self.after[name]:,}" for name, old in self.before.items())
        return short(self, ", ".join(ways))

    @property
    def after(self) -> dict[str, int]:
        """Field -> value after the last step."""
        return self.steps[-1]

    def to_dict(self) -> dict[str, Any]:
        """The width for ``json.dumps``."""
        return {
            "name": self.name,
            "before": self.before,
            "after": self.after,
            "steps": list(self.steps),
            "asked_ratio": self.asked,
            "reached_ratio": self.reached,
            "reachable": described(self.reachable),
            "multiples_of": list(self.multiples),
            "tensor_parallel_ranks": list(self.ranks),
            "parameters_per_unit": self.parameters,
        }


@dataclass(frozen=True)
class PlannedRefusal:
    """Values that the class refuses, and settings near them that it takes.

    Attributes:
        step: the step that would lead there.
        values: field -> value, those that differ from now.
        reason: the class's own words.
        nearest: settings it takes: field -> ratio, and field -> value that it leads to.
    """

    step: int
    values: dict[str, int]
    reason: str
    nearest: tuple[tuple[dict[str, float], dict[str, int]], ...]

    def to_dict(self) -> dict[str, Any]:
        """The refusal for ``json.dumps``."""
        return {
            "step": self.step,
            "values": self.values,
            "reason": self.reason,
            "nearest": [{"ratios": ratios, "values": values} for ratios, values in self.nearest],
        }


@dataclass(frozen=True)
class Settings:
    """Arguments of the pruner, as far as they decide widths."""

    prune: tuple[str, ...] | None
    pruning_ratio: float
    ratios: dict[str, float]
    prune_num_heads: bool
    gqa: Gqa | None
    head_pruning_ratio: float
    iterative_steps: int
    round_to: int | None
    max_pruning_ratio: float
    scheduler: Scheduler | None = None

    def to_dict(self) -> dict[str, Any]:
        """The settings for ``json.dumps``."""
        values = {key: value for key, value in vars(self).items() if key != "scheduler"}
        return {**values, "prune": None if self.prune is None else list(self.prune)}


@dataclass(frozen=True)
class Plan:
    """What pruning with some settings gives; ``print`` it, or print it with rich.

    Attributes:
        model: the class.
        settings: the pruner's arguments.
        widths: the widths that are pruned.
        kept: width -> why it cannot be pruned.
        before: the size now.
        after: the size in the end; ``None`` where the class refuses the widths.
        adjusted: steps at which the class does not take what is asked for, and what is done; widths
            of which less goes than their ratio says, and why.
        refusal: why the settings cannot be carried out; ``None`` where they can.
        target: how many parameters were asked for, if any were.
        why_not_exactly: why fewer are left; ``None``: as many are, or none were asked for.
        tokens: FLOPs are counted for each token; else for each input (an image, a recording).
        notes: what else the user should know.
    """

    model: str
    settings: Settings
    widths: tuple[PlannedWidth, ...]
    kept: dict[str, str]
    before: Size
    after: Size | None
    refusal: PlannedRefusal | None
    adjusted: tuple[str, ...] = ()
    target: int | None = None
    why_not_exactly: str | None = None
    tokens: bool = True
    notes: tuple[str, ...] = ()
    _live: Callable[[], nn.Module | None] = field(default=lambda: None, repr=False, compare=False)
    _fields: dict[FieldPath, int] = field(default_factory=dict, repr=False, compare=False)

    @property
    def values(self) -> dict[str, int]:
        """Field -> value in the end, for every field that is pruned."""
        return {name: value for width in self.widths for name, value in width.after.items()}

    def pruner_kwargs(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Arguments for a Torch-Pruning pruner that does what is planned; add ``importance=``.

        Args:
            model: the model to prune; by default the one that the plan was made of.

        Raises:
            ConfigSyncError: the class refuses what is planned.
            UnsupportedModelError: no model with weights, or one with another config.
        """
        if self.refusal is not None:
            words = " ".join(line.strip() for line in refusal_lines(self.refusal))
            raise ConfigSyncError(f"this plan of {self.model} cannot be carried out: {words}")
        model = self._live() if model is None else model
        if model is None:
            raise UnsupportedModelError(
                f"this plan of {self.model} was made of a config, or of a model that is gone. Pass "
                "the model to prune: plan.pruner_kwargs(model)."
            )
        _, pretrained = find_pretrained(model)
        if type(pretrained).__name__ != self.model or map_of(pretrained).values != self._fields:
            raise UnsupportedModelError(
                f"this plan was made for a {self.model} with another config than the one of this "
                f"{type(pretrained).__name__}. Make a new one: tp_hf_config.plan(model, ...)."
            )
        asked = self.settings
        kwargs = pruner_kwargs(
            model,
            prune=asked.prune,
            ratios=asked.ratios or None,
            graph="config",
            prune_num_heads=asked.prune_num_heads,
            gqa=asked.gqa,
            round_to=asked.round_to,
        )
        kwargs |= {
            "pruning_ratio": asked.pruning_ratio,
            "head_pruning_ratio": asked.head_pruning_ratio,
            "iterative_steps": asked.iterative_steps,
            "max_pruning_ratio": asked.max_pruning_ratio,
        }
        if asked.scheduler is not None:
            kwargs["iterative_pruning_ratio_scheduler"] = asked.scheduler
        return kwargs

    def __str__(self) -> str:
        return text(self)

    def __repr__(self) -> str:
        after = "refused" if self.after is None else f"{self.after.parameters:,} parameters"
        widths = f"{len(self.widths)} width{'' if len(self.widths) == 1 else 's'}"
        return short(self, f"{self.model}: {widths}, {self.before.parameters:,} -> {after}")

    def _repr_html_(self) -> str:
        return html(self)

    def __rich__(self) -> Any:
        return table(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan for ``json.dumps``, with the versions it was made by."""
        found = {
            "model": self.model,
            "settings": self.settings.to_dict(),
            "widths": [width.to_dict() for width in self.widths],
            "kept": self.kept,
            "before": self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
            "refusal": None if self.refusal is None else self.refusal.to_dict(),
            "adjusted": list(self.adjusted),
            "target_parameters": self.target,
            "why_not_exactly": self.why_not_exactly,
            "notes": list(self.notes),
        }
        return dated(found)
