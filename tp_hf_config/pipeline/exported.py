"""What an export is asked for, what is ready to be written, and its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import as_range
from ..reports import Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .companions import Copied
    from .padding_proof import SameOutputs
    from .source import Source

Format = Literal["padded", "decilm", "gguf"]
"""What a model can be exported to."""
GGUF_FILE = "model.gguf"
"""The file in the folder of an export to ``"gguf"``."""
Fields = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""A config field -> its value in each layer before and after."""


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        model: the model.
        source: where it was read from; ``None`` for a model that was given.
        multiple_of: what padded widths have to be a multiple of; ``None``: nothing.
    """

    model: PreTrainedModel
    source: Source | None = None
    multiple_of: int | None = None


@dataclass(frozen=True)
class Ready:
    """An export that is proved and can be written.

    Attributes:
        write: writes it into an empty folder.
        fields: the fields that were padded, or by which layers differ.
        parameters: how many parameters it has.
        proof: the comparison of its outputs with the model's.
        loading: how it is loaded, for the model card.
        notes: what else the user should know.
        holds_tokenizer: the tokenizer is in what is written, and its files are not copied.
    """

    write: Callable[[Path], None]
    fields: Fields
    parameters: int
    proof: SameOutputs
    loading: str
    notes: tuple[str, ...] = ()
    holds_tokenizer: bool = False


@dataclass(frozen=True, repr=False)
class Exported(Report):
    """The result of an export; ``str`` gives a few lines of text.

    Attributes:
        model: the name of the stock class.
        to: the format.
        out: the folder that was written.
        fields: config field -> its value in each layer before and after.
        parameters: the number of parameters before and after.
        proof: the comparison of the outputs before and after.
        copied: the files that were copied, and those that were not.
        loading: how it is loaded.
        notes: what else the user should know.
        seconds: wall-clock time.
    """

    model: str
    to: str
    out: Path
    fields: Fields
    parameters: tuple[int, int]
    proof: SameOutputs
    copied: Copied
    loading: str
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def widths(self) -> dict[str, tuple[str, str]]:
        """Return config field -> its values before and after, as text: ``768..1536``."""
        return {name: (as_range(old), as_range(new)) for name, (old, new) in self.fields.items()}

    def title(self) -> str:
        """Return the class and the format, with the widths that changed."""
        widths = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.widths.items())
        return f"{self.model}, {self.to}: {widths or 'all layers alike'}"

    def lines(self) -> Iterator[str]:
        """Yield what it came to, and where it was written."""
        before, after = self.parameters
        yield f"parameters: {before:,} -> {after:,}"
        yield f"proof: {self.proof}"
        if self.copied.files:
            yield f"copied: {', '.join(self.copied.files)}"
        yield from (f"note: {note}" for note in self.notes)
        yield f"written: {self.out} ({self.seconds:.0f} s)"
