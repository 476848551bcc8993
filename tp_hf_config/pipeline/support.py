"""Try which widths of a class can be pruned, saved and loaded again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from torch import nn

from ..arguments import check_arguments
from ..errors import UnsupportedModelError
from ..fieldmap.learn_field_map import map_of
from ..forward.coverage import InputsRefusal
from ..forward.run_recipe import MakeInputs
from ..model.build import Refusal, module_of
from ..model.disk_cache import suspended
from ..model.locate import check_followable, find_pretrained
from ..model.surroundings import (
    one_thread,
    plain_autograd,
    quiet_transformers,
    same_random_state,
)
from ..reports import Report, Rows, short
from ..schema import versions
from ..twin.tiny.tiny_model import tiny_model
from .trial import Outcome, Subject, Trial, WidthSupport, reloaded, subject, trials

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, repr=False)
class Support(Report):
    """Which widths of one class can be pruned; ``str`` gives a table.

    Attributes:
        model: the name of the class.
        widths: every width that was tried, with its outcome.
        why_not: why nothing could be tried; ``None`` if the tiny model runs.
        partial: the tiny model ran on text alone, although the class takes images or sound too.
        seed: the seed of the random weights.
        versions: the versions of the packages that were tried.
    """

    model: str
    widths: tuple[WidthSupport, ...] = ()
    why_not: str | None = None
    partial: bool = False
    seed: int = 0
    versions: dict[str, str] = field(default_factory=versions)

    def outcome(self, name: str) -> Outcome | None:
        """Return the outcome of a config field; ``None``: the class has no width with this field.

        Return ``failed`` if any width with this field failed, else ``works`` if any works, else
        ``refused``.
        """
        outcomes = {width.outcome for width in self.widths if name in width.fields}
        ranked: tuple[Outcome, ...] = ("failed", "works", "refused")
        return next((outcome for outcome in ranked if outcome in outcomes), None)

    def title(self) -> str:
        """Return the class, and why nothing can be tried."""
        if self.why_not is not None:
            return f"{self.model}: nothing can be tried: {self.why_not}"
        return f"{self.model} (seen on text alone)" if self.partial else self.model

    def rows(self) -> Rows:
        """Return a row for each width."""
        rows = [(width.name, width.outcome, width.why) for width in self.widths]
        return [("config field", "outcome", "why"), *rows] if rows else ()

    def __repr__(self) -> str:
        if self.why_not is not None:
            return super().__repr__()
        works = sum(width.outcome == "works" for width in self.widths)
        verb = "works" if works == 1 else "work"
        return short(self, f"{self.model}: {works} of {len(self.widths)} widths {verb}")


@check_arguments
def supports(
    source: nn.Module | PreTrainedConfig,
    *,
    model_class: type[PreTrainedModel] | None = None,
    seed: int = 0,
    make_inputs: MakeInputs | None = None,
) -> Support:
    """Prune every width of a class at tiny size, and report which of them work.

    Half of each width is pruned in one step and in two, by Torch-Pruning's ``MetaPruner`` with
    :func:`~tp_hf_config.pruner_kwargs`.  The pruned model has to compute what the original computes
    with the removed units masked.  A model loaded from the saved folder has to compute the same
    bits.  The model itself is not touched, and its size does not matter. Nothing is taken from the
    cache of earlier experiments: all is measured anew.

    Args:
        source: a model, with or without weights, or a config.
        model_class: the class to build from a config; default: the class that the config names, or
            the one that the auto classes have for it.
        seed: the seed of the tiny model's random weights.
        make_inputs: a function of a config that returns a forward pass's keyword arguments, for a
            class that the library cannot feed by itself: see :func:`~tp_hf_config.prunable`.

    Returns:
        A report. ``widths`` has one entry for each width: its fields, its outcome (``works``,
        ``refused`` before anything was pruned, ``failed``) and why; ``why_not`` is set if the tiny
        model does not run.

    Raises:
        UnsupportedModelError: ``source`` is not a single Hugging Face model, or a config that
            builds none; or ``make_inputs`` raises or returns what the class does not run with.
        TypeError: ``source`` is neither a module nor a config.
    """
    _, model = find_pretrained(module_of(source, model_class))
    check_followable(model, weights=False)
    name = type(model).__name__
    with (
        TemporaryDirectory(prefix="tp_hf_config-") as folder,
        one_thread(),
        plain_autograd(),
        same_random_state(),
        quiet_transformers(),
        suspended(),
    ):
        case = prepared(model, seed, make_inputs)
        if isinstance(case, Refusal):
            return Support(name, why_not=case.reason, seed=seed)
        widths = tuple(after_reload(trial, type(model)) for trial in trials(case, Path(folder)))
    return Support(name, widths, None, case.tiny.partial, seed)


def prepared(
    model: PreTrainedModel, seed: int, make_inputs: MakeInputs | None = None
) -> Subject | Refusal:
    """Return the model to prune with its tiny model, or why no tiny model of the class runs.

    Raises:
        UnsupportedModelError: the class does not run with what the user's function makes.
    """
    tiny = tiny_model(map_of(model, make_inputs=make_inputs))
    if isinstance(tiny, InputsRefusal):
        raise UnsupportedModelError(tiny.reason)
    if isinstance(tiny, Refusal):
        return tiny
    return subject(tiny, seed)


def after_reload(trial: Trial, model_class: type[nn.Module]) -> WidthSupport:
    """Load what a trial saved, and return its result: ``failed`` if a loaded model differs.

    ``trial``: a width that was pruned, with the folders of the pruned models.
    """
    for folder in trial.folders:
        refusal = reloaded(model_class, folder)
        if refusal is not None:
            return replace(trial.width, outcome="failed", why=refusal.reason)
    return trial.width
