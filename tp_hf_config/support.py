"""What of one class can be pruned, saved and loaded again: tried, not looked up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from .learn import map_of
from .measure import Outcome, Subject, Trial, WidthSupport, reloaded, subject, trials
from .miniature import miniature
from .notebook import page, short, table
from .offers import one_thread
from .reference import Refusal
from .schema import dated, versions
from .silence import quiet_transformers
from .unbuilt import model_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Support:
    """What was measured about one class; printed as a table.

    Attributes:
        model: the class.
        widths: every width that the class has, and what pruning it came to.
        why_not: why nothing could be tried; ``None`` where the tiny copy runs.
        partial: only text went through the tiny copy, though the class takes images or sound too.
        seed: of the random weights.
        versions: of what was tried.
    """

    model: str
    widths: tuple[WidthSupport, ...] = ()
    why_not: str | None = None
    partial: bool = False
    seed: int = 0
    versions: dict[str, str] = field(default_factory=versions)

    def outcome(self, name: str) -> Outcome | None:
        """What a config field came to; ``None``: the class has no such width.

        ``failed`` where any way of pruning it did, else ``works`` where any does.
        """
        found = {width.outcome for width in self.widths if name in width.fields}
        ranked: tuple[Outcome, ...] = ("failed", "works", "refused")
        return next((one for one in ranked if one in found), None)

    def __str__(self) -> str:
        if self.why_not is not None:
            return f"{self.model}: nothing can be tried: {self.why_not}"
        size = max((len(width.name) for width in self.widths), default=0)
        lines = [f"{w.name:<{size}}  {w.outcome:<7}  {w.why}".rstrip() for w in self.widths]
        seen = " (seen on text alone)" if self.partial else ""
        return "\n".join([f"{self.model}{seen}", *lines])

    def __repr__(self) -> str:
        if self.why_not is not None:
            return short(self, str(self))
        works = sum(width.outcome == "works" for width in self.widths)
        verb = "works" if works == 1 else "work"
        return short(self, f"{self.model}: {works} of {len(self.widths)} widths {verb}")

    def _repr_html_(self) -> str:
        rows = [(width.name, width.outcome, width.why) for width in self.widths]
        return page(str(self).split("\n", 1)[0], table(("config field", "outcome", "why"), rows))

    def to_dict(self) -> dict[str, Any]:
        """The measurement for ``json.dumps``."""
        found = {
            "model": self.model,
            "widths": [width.to_dict() for width in self.widths],
            "why_not": self.why_not,
            "partial": self.partial,
            "seed": self.seed,
            "versions": self.versions,
        }
        return dated(found)


def supports(
    source: nn.Module | PreTrainedConfig,
    *,
    model_class: type[PreTrainedModel] | None = None,
    seed: int = 0,
) -> Support:
    """Prune every width of a class at tiny size, and see what comes of it.

    Each width goes by half in one step and in two, through Torch-Pruning's ``MetaPruner`` with
    :func:`~tp_hf_config.pruner_kwargs`. The pruned model has to compute what the original does with
    the removed units masked, and a model loaded from what was saved has to compute the same bits.
    The model itself is not touched, and its size does not matter.

    Args:
        source: a model, also one without weights, or a config.
        model_class: the class to build from a config; default: what the auto classes make of it.
        seed: of the tiny copy's random weights.

    Raises:
        UnsupportedModelError: no single Hugging Face model, or a config that builds none.
        TypeError: neither a module nor a config.
    """
    model = model_of(source, model_class)
    name = type(model).__name__
    with TemporaryDirectory(prefix="tp_hf_config-") as folder, one_thread(), quiet_transformers():
        made = prepared(model, seed)
        if isinstance(made, Refusal):
            return Support(name, why_not=made.reason, seed=seed)
        widths = tuple(after_reload(trial, type(model)) for trial in trials(made, Path(folder)))
    return Support(name, widths, None, made.mini.partial, seed)


def prepared(model: PreTrainedModel, seed: int) -> Subject | Refusal:
    """The tiny copy of a model's class that is pruned, and how it runs."""
    mini = miniature(map_of(model))
    if isinstance(mini, Refusal):
        return mini
    return subject(mini, seed)


def after_reload(trial: Trial, model_class: type[nn.Module]) -> WidthSupport:
    """The result of a trial once what it saved was loaded again."""
    reasons: Sequence[str | None] = [reloaded(model_class, one) for one in trial.folders]
    wrong = next((reason for reason in reasons if reason is not None), None)
    if wrong is None:
        return trial.width
    return replace(trial.width, outcome="failed", why=wrong)
