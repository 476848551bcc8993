"""What dropping layers did: which went, what the config says now, how small the model is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import notebook
from ..notebook import short
from ..schema import dated


@dataclass(frozen=True)
class DroppedLayers:
    """The layers that a model lost; ``str`` gives a few lines of text.

    Attributes:
        layers: the name of the list of layers.
        dropped: the numbers of the layers that went, as they were.
        kept: the numbers of the layers that are left, as they were; the first is layer 0 now.
        fields: config field -> (old value, new value).
        parameters: the number of parameters before and after.
        influence: of each layer, how much it changed the hidden states (1 - cosine of what went in
            and what came out, the mean over tokens); empty if it was not measured.
        proof: what the config was compared with.
        notes: what else the user should know.
    """

    layers: str
    dropped: tuple[int, ...]
    kept: tuple[int, ...]
    fields: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    influence: tuple[float, ...] = ()
    proof: str = ""
    notes: Sequence[str] = ()

    @property
    def in_one_line(self) -> str:
        """Return which layers went, without what changed with them."""
        total = len(self.dropped) + len(self.kept)
        went = ", ".join(self._in_words(number) for number in self.dropped)
        return f"{self.layers}: {len(self.dropped)} of {total} layers dropped ({went})"

    def __str__(self) -> str:
        before, after = self.parameters
        changes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.fields.items())
        lines = [
            self.in_one_line,
            f"  {changes or 'no config field changes'}",
            f"  parameters {before:,} -> {after:,} ({after / max(1, before):.1%}); {self.proof}",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _in_words(self, number: int) -> str:
        """Return a layer's number, with its influence if that was measured."""
        if not self.influence:
            return str(number)
        return f"{number}: influence {self.influence[number]:.3f}"

    def __repr__(self) -> str:
        return short(self, str(self))

    def _repr_html_(self) -> str:
        rows = [(name, old, new) for name, (old, new) in self.fields.items()]
        return notebook.report(str(self), notebook.table(("config field", "old", "new"), rows))

    def to_dict(self) -> dict[str, Any]:
        """Return the report for ``json.dumps``, with the versions that made it."""
        data = {
            "layers": self.layers,
            "dropped": list(self.dropped),
            "kept": list(self.kept),
            "fields": {name: {"old": old, "new": new} for name, (old, new) in self.fields.items()},
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "influence": list(self.influence),
            "proof": self.proof,
            "notes": list(self.notes),
        }
        return dated(data)
