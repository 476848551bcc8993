"""What dropping layers did: which went, what the config says now, how small the model is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..reports import Report


@dataclass(frozen=True, repr=False)
class DroppedLayers(Report):
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

    def title(self) -> str:
        """Return which layers went, without what changed with them."""
        total = len(self.dropped) + len(self.kept)
        went = ", ".join(self._in_words(number) for number in self.dropped)
        return f"{self.layers}: {len(self.dropped)} of {total} layers dropped ({went})"

    def lines(self) -> Iterator[str]:
        """Yield what changed with the layers, and notes."""
        before, after = self.parameters
        changes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.fields.items())
        yield f"  {changes or 'no config field changes'}"
        yield f"  parameters {before:,} -> {after:,} ({after / max(1, before):.1%}); {self.proof}"
        yield from (f"  note: {note}" for note in self.notes)

    def _in_words(self, number: int) -> str:
        """Return a layer's number, with its influence if that was measured."""
        if not self.influence:
            return str(number)
        return f"{number}: influence {self.influence[number]:.3f}"
