"""What is to be pruned, and what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..schema import dated
from .source import Source

if TYPE_CHECKING:
    from ..plans import Plan
    from ..report import SyncReport
    from .companions import Copied
    from .roundtrip import Proof

Importance = Literal["magnitude", "taylor", "random"]


@dataclass(frozen=True)
class Job:
    """What to prune, how, and where to put it.

    Attributes:
        source: the model.
        out: the folder to write.
        widths: arguments of :func:`~tp_hf_config.plan`.
        importance: how Torch-Pruning ranks channels.
        calibration: a text file, for Taylor importance and recovery.
        recover: updates of distillation from the unpruned model, spread over the steps.
        device: where to compute.
        dtype: torch's name of the weights' type; default: as they are stored.
        seed: of everything that is random.
        max_shard_size: of the weight files, as ``save_pretrained`` takes it.
        overwrite: a model in ``out`` is replaced.
        command: how a user said all this, for the model card.
    """

    source: Source
    out: Path
    widths: Mapping[str, Any]
    importance: Importance = "magnitude"
    calibration: Path | None = None
    recover: int = 0
    device: str = "cpu"
    dtype: str | None = None
    seed: int = 0
    max_shard_size: str | None = None
    overwrite: bool = False
    command: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, by name; what was not is left out."""
        own = {
            "importance": self.importance,
            "calibration": None if self.calibration is None else self.calibration.name,
            "recover": self.recover or None,
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "command": self.command or None,
        }
        return {name: value for name, value in {**self.widths, **own}.items() if value is not None}


@dataclass(frozen=True)
class Pruned:
    """What was done; printed as a few lines.

    Attributes:
        model: the class.
        out: the folder.
        plan: what was planned.
        reports: one for each step.
        parameters: their number before and after.
        proof: of the round trip.
        copied: files that went along, and those that did not.
        perplexity: on held-out text, before and after; ``None`` where it was not measured.
        notes: what else the user should know.
        seconds: wall-clock time.
    """

    model: str
    out: Path
    plan: Plan
    reports: tuple[SyncReport, ...]
    parameters: tuple[int, int]
    proof: Proof
    copied: Copied
    perplexity: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, tuple[Any, Any]]:
        """Config field -> value before the first step, value after the last."""
        return changed(self.reports)

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            f"{self.model}: {', '.join(f'{n} {a} -> {b}' for n, (a, b) in self.fields.items())}"
        ]
        lines.append(f"parameters: {before:,} -> {after:,} ({after / before:.1%})")
        if self.perplexity is not None:
            old, new = self.perplexity
            lines.append(f"perplexity on held-out text: {old:.1f} -> {new:.1f}")
        lines.append(f"proof: {self.proof}")
        if self.copied.files:
            lines.append(f"copied: {', '.join(self.copied.files)}")
        if self.copied.left:
            lines.append(f"not copied: {', '.join(self.copied.left)}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"written: {self.out} ({self.seconds:.0f} s)"])

    def to_dict(self) -> dict[str, Any]:
        """The result for ``json.dumps``, with the versions it was made by."""
        found = {
            "model": self.model,
            "out": str(self.out),
            "settings": dict(self.settings),
            "fields": {name: {"old": old, "new": new} for name, (old, new) in self.fields.items()},
            "parameters": dict(zip(("before", "after"), self.parameters, strict=True)),
            "perplexity": None
            if self.perplexity is None
            else dict(zip(("before", "after"), self.perplexity, strict=True)),
            "proof": {"tensors": self.proof.tensors, "numbers": self.proof.numbers},
            "copied": list(self.copied.files),
            "not_copied": list(self.copied.left),
            "notes": list(self.notes),
            "plan": self.plan.to_dict(),
            "steps": [report.to_dict() for report in self.reports],
            "seconds": self.seconds,
        }
        return dated(found)


def changed(reports: tuple[SyncReport, ...]) -> dict[str, tuple[Any, Any]]:
    """Config field -> value before the first report, value after the last."""
    found: dict[str, tuple[Any, Any]] = {}
    for report in reports:
        for name, (old, new) in report.fields.items():
            found[name] = (found.get(name, (old,))[0], new)
    return found
