"""Show a plan as text, table, HTML and JSON; ``make_plan`` computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..arguments import check_arguments
from ..errors import ConfigSyncError, UnsupportedModelError
from ..fieldmap.model_view import view_of
from ..forward.run_recipe import MakeInputs
from ..graph.layer_fields import layers_listed
from ..graph.standin import standin_of
from ..model.config_json import FieldPath
from ..model.layer_entries import name_in_all_layers
from ..reports import Report, Rows, fields_as_json, short
from .model_size import Size
from .pruner_kwargs import pruner_kwargs
from .refusals import PlannedRefusal, refusal_lines
from .settings import PruneSettings
from .working_time import WorkingTime


@dataclass(frozen=True)
class PlannedWidth:
    """One width: what was asked for, what it will be, what it could be.

    Attributes:
        name: the names of its config fields.
        before: field -> value now.
        steps: for each step, field -> value after it.
        asked: the ratio that was asked for.
        reached: the share of the units that will be gone.
        reachable: the values that its first field can reach while all other fields stay; head
            counts only where the class accepts them.
        multiples: which of 64, 128 and 256 divide the pruned dimensions (of heads: their channels)
            in every layer.
        ranks: over which of 2, 4 and 8 tensor-parallel ranks the fields divide; for heads, both
            the query and the key/value heads.
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
        """Return field -> value after the last step."""
        return self.steps[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return the width for ``json.dumps``."""
        reachable = described(self.reachable)
        return {**fields_as_json(self), "after": self.after, "reachable": reachable}


@dataclass(frozen=True, repr=False)
class Plan(Report):
    """What pruning with some settings gives; ``print`` it.

    Attributes:
        model: the name of the class.
        settings: the pruner's arguments.
        widths: the widths that are pruned.
        kept: the name of each other width -> why it stays.
        before: the size now.
        after: the size in the end; ``None`` if the class refuses the widths.
        refusal: why the settings cannot be carried out; ``None`` if they can.
        adjusted: lines about steps at which the class refuses what is asked for, and what is done
            instead; and about widths that lose less than their ratio says, and why.
        target: how many parameters were asked for; ``None`` if no number was.
        why_not_exactly: why fewer are left; ``None`` if as many are left or no number was asked
            for.
        tokens: FLOPs are counted for each token; else for each input (an image, a recording).
        notes: what else the user should know.
        time: how long calibrating and a step with refits take in memory; ``None`` if the class
            refuses the widths, does not run at tiny ones, or takes no tokens.
    """

    model: str
    settings: PruneSettings
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
    time: WorkingTime | None = None
    _live: Callable[[], nn.Module | None] = field(default=lambda: None, repr=False, compare=False)
    _fields: dict[FieldPath, int] = field(default_factory=dict, repr=False, compare=False)
    _make_inputs: MakeInputs | None = field(default=None, repr=False, compare=False)

    @property
    def values(self) -> dict[str, int]:
        """Return field -> value in the end, for every field that is pruned."""
        return {name: value for width in self.widths for name, value in width.after.items()}

    @check_arguments
    def pruner_kwargs(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return arguments for a Torch-Pruning pruner that carries the plan out.

        Args:
            model: the model to prune; default: the one that the plan was made of.

        Returns:
            Keyword arguments; add ``importance=`` and pass them on with ``**``.

        Raises:
            ConfigSyncError: the class refuses what is planned.
            UnsupportedModelError: there is no model with weights, or it has another config.
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
        standin = standin_of(model)
        with layers_listed(standin, self.settings.layers):
            view = view_of(standin, self._make_inputs)
            name = type(view.model).__name__
        if name != self.model or view.field_map.values != self._fields:
            raise UnsupportedModelError(
                f"this plan was made for a {self.model} with another config than the one of this "
                f"{name}. Make a new one: tp_hf_config.plan(model, ...)."
            )
        return pruner_kwargs(model, make_inputs=self._make_inputs, **self.settings.arguments())

    def title(self) -> str:
        """Return the name of the class."""
        return self.model

    def rows(self) -> Rows:
        """Return a row for each width."""
        return [_HEAD, *map(_row, self.widths)]

    def lines(self) -> list[str]:
        """Return the sizes before and after, and what else there is to say."""
        return [*_sizes(self), *_footnotes(self)]

    def __repr__(self) -> str:
        after = "refused" if self.after is None else f"{self.after.parameters:,} parameters"
        widths = f"{len(self.widths)} width{'' if len(self.widths) == 1 else 's'}"
        return short(self, f"{self.model}: {widths}, {self.before.parameters:,} -> {after}")


_HEAD = ("config field", "now", "planned", "ratio", "can be", "multiple of", "ranks")


def described(values: Sequence[int]) -> str:
    """Return values in few words: ``every 64th from 64 to 8192``, ``3, 6, 9``."""
    if isinstance(values, range) and len(values) > 4:
        step = values.step
        if step == 1:
            return f"{values[0]:,} to {values[-1]:,}"
        return f"every {_ordinal(step)} from {values[0]:,} to {values[-1]:,}"
    return ", ".join(f"{value:,}" for value in values)


def _ordinal(number: int) -> str:
    """Return ``1st``, ``2nd``, ``3rd``, ``4th``, ..."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"


def _row(width: PlannedWidth) -> tuple[str, ...]:
    """Return the row of one width."""
    ways = [" -> ".join(f"{step[name]:,}" for step in width.steps) for name in width.before]
    return (
        width.name,
        " + ".join(f"{value:,}" for value in width.before.values()),
        " + ".join(ways),
        f"{width.reached:.3f} of {width.asked:g}",
        described(width.reachable),
        ", ".join(map(str, width.multiples)) or "-",
        ", ".join(map(str, width.ranks)) or "-",
    )


def _sizes(plan: Plan) -> Iterator[str]:
    """Yield a line for parameters, bytes and FLOPs, now and in the end."""
    for key, name in {
        "parameters": "parameters",
        "bytes": "bytes",
        "flops": "FLOPs a token" if plan.tokens else "FLOPs an input",
        "gram_bytes": "bytes to calibrate",
    }.items():
        old, new = getattr(plan.before, key), getattr(plan.after, key, None)
        share = f" ({new / old:.1%})" if old and new is not None else ""
        now, then = ("?" if number is None else f"{number:,}" for number in (old, new))
        yield f"{name}: {now} -> {then}{share}"


def _footnotes(plan: Plan) -> list[str]:
    """Return the lines under the tables."""
    lines = [] if plan.refusal is None else refusal_lines(plan.refusal)
    if plan.target is not None and plan.after is not None:
        lines.append(
            f"target of {plan.target:,} parameters: {plan.after.parameters:,} at "
            + ", ".join(_ratios(plan))
            + ("" if plan.why_not_exactly is None else f"; {plan.why_not_exactly}")
        )
    lines += plan.adjusted
    layers = Counter((name_in_all_layers(name), reason) for name, reason in plan.kept.items())
    for (name, reason), number in layers.items():
        where = f" (of {number} layers)" if number > 1 else ""
        lines.append(f"stays: {name}{where}: {reason}")
    if plan.time is not None:
        lines.append(f"in memory, on two CPU cores, estimated: {plan.time}")
    return lines + [f"note: {note}" for note in plan.notes]


def _ratios(plan: Plan) -> Iterator[str]:
    """Yield the ratios that lead to the target, the common one of all widths first."""
    settings = plan.settings
    asked = {w.asked for w in plan.widths if not w.before.keys() & settings.ratios.keys()}
    if settings.pruning_ratio in asked:
        yield f"one ratio of {settings.pruning_ratio:g}"
    if settings.head_pruning_ratio in asked - {settings.pruning_ratio}:
        yield f"a head ratio of {settings.head_pruning_ratio:g}"
    yield from (f"{name} {ratio:g}" for name, ratio in settings.ratios.items())
