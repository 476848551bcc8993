"""What a job is to do, its result and that of an export, and a display of progress. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..errors import PipelineError, as_range
from ..reports import Report, old_and_new
from .source import Source

if TYPE_CHECKING:
    from ..hook.drop_layers import DroppedLayers
    from ..hook.report import SyncReport
    from ..planning.allocate import Allocation
    from ..planning.plan import Plan
    from .companions import Copied
    from .proofs import Proof, SameOutputs

T = TypeVar("T")
Ranking = Literal["local", "global", "isomorphic"]
Importance = Literal["wanda", "activation", "flap", "obs", "magnitude", "taylor", "random"]
Format = Literal["padded", "decilm", "gguf"]
"""What a model can be exported to."""
ByLayer = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""A config field -> its value in each layer before and after."""
TEXTS = ("held-out text of the calibration file", "a second text, never calibrated on")
"""The texts on which perplexity is measured, in words."""


class Progress:
    """A display of how far a job is; this one shows nothing."""

    def say(self, what: object) -> None:
        """Show that something was done or found."""

    def track(
        self, items: Iterable[T], total: int, what: str, unit: str = "windows"
    ) -> Iterator[T]:
        """Yield the items, ``total`` of them, and show how many are done."""
        yield from items


@dataclass(frozen=True)
class Job:
    """What to prune, how, and where to write the result.

    Attributes:
        source: the model.
        out: the folder to write.
        widths: keyword arguments for :func:`~tp_hf_config.plan`; none: only layers are dropped.
        importance: how channels are ranked: by what they carry on a text (the first four, see
            :meth:`~tp_hf_config.Calibration.importance`) or by one of Torch-Pruning's importances;
            ``None``: ``wanda`` where there is a text, else ``magnitude``.
        calibration: a text file to run the model on, or ``"own"``: what the model writes itself;
            ``None``: for a causal language model the text that comes with the package.
        recover: the number of updates of distillation from the unpruned model, spread over the
            steps.
        device: torch's name of the device to compute on.
        dtype: torch's name of the weights' dtype; ``None``: as they are stored.
        refit: refit the weights that read pruned channels, where there is a text.
        seed: the seed of everything that is random.
        max_shard_size: the size of each weight file, as ``save_pretrained`` takes it.
        overwrite: replace a model that is in ``out``.
        drop_layers: how many layers to drop before widths are pruned: those of least influence.
        drop_from: the list of layers that they are dropped from, where a model has several.
        stream: put weights that are cut into mapped files beside ``out``, which the system pages;
            ``None``: if the model would take more than half of the free memory.
        ranking: which units are ranked together: those of each layer alone, of all layers
            (Torch-Pruning's ``global_pruning``) or of layers of one structure (``isomorphic``).
        allocate: every layer gets the width that the model misses least, for the target in
            ``widths``.
        tokens: how many tokens of the text the model is measured on; ``None``: as many as
            ``calibrate`` takes by itself.
        command: the command line that the user typed, for the model card.
    """

    source: Source
    out: Path
    widths: Mapping[str, Any]
    importance: Importance | None = None
    calibration: Path | Literal["own"] | None = None
    recover: int = 0
    device: str = "cpu"
    dtype: str | None = None
    refit: bool = True
    seed: int = 0
    max_shard_size: str | None = None
    overwrite: bool = False
    drop_layers: int = 0
    drop_from: str | None = None
    stream: bool | None = None
    ranking: Ranking = "local"
    allocate: bool = False
    tokens: int | None = None
    command: str = ""

    @property
    def per_layer(self) -> bool:
        """Whether each layer may get widths of its own."""
        return bool(self.widths.get("per_layer"))

    @property
    def steps(self) -> int:
        """The number of pruning steps."""
        return int(self.widths.get("iterative_steps", 1))


def calibration_text(job: Job) -> str | None:
    """Return the text in a job's calibration file; ``None`` if it has none.

    Raises:
        PipelineError: the file cannot be read, is not UTF-8 or is empty.
    """
    path = job.calibration
    if path is None or path == "own":
        return None
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PipelineError(
            f"{path}: expected plain text in UTF-8, found other bytes at {error.start:,}"
        ) from error
    except OSError as error:
        raise PipelineError(f"{path}: calibration text cannot be read: {error.strerror}") from error
    if not text.strip():
        raise PipelineError(f"{path}: the calibration text is empty")
    return text


@dataclass(frozen=True)
class Layerwise:
    """How a saved model whose layers differ is loaded.

    Attributes:
        widths: config field -> its value in each layer.
        auto_class: the class of Transformers whose ``from_pretrained`` loads it.
        file: the name of the generated file that builds its layers.
    """

    widths: Mapping[str, tuple[Any, ...]]
    auto_class: str
    file: str

    def loading(self, folder: str) -> str:
        """Return the call that loads it from a folder."""
        return f'{self.auto_class}.from_pretrained("{folder}", trust_remote_code=True)'


@dataclass(frozen=True, repr=False)
class Pruned(Report):
    """The result of a job; ``str`` gives a few lines of text.

    Attributes:
        model: the name of the class.
        out: the folder that was written.
        plan: the plan that was carried out; ``None`` if only layers were dropped.
        steps: one report for each step.
        parameters: the number of parameters before and after.
        proof: the proof of the round trip.
        copied: the files that were copied, and those that were not.
        perplexity: on held-out text of the calibration file, before and after; ``None`` if it was
            not measured.
        perplexity_second_text: of a causal language model on a second text, which comes with the
            package and which nothing is calibrated on; likewise.
        notes: what else the user should know.
        seconds: wall-clock time.
        settings: what was done, by name.
        dropped_layers: the layers that were dropped; ``None`` if none were.
        allocation: the widths by layer that were carried out; ``None`` if there was a plan.
        layers_differ: how a model whose layers differ is loaded; ``None`` if they do not differ.
    """

    model: str
    out: Path
    plan: Plan | None
    steps: tuple[SyncReport, ...]
    parameters: tuple[int, int]
    proof: Proof
    copied: Copied
    perplexity: tuple[float, float] | None = None
    perplexity_second_text: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    dropped_layers: DroppedLayers | None = None
    allocation: Allocation | None = None
    layers_differ: Layerwise | None = None

    @property
    def fields(self) -> dict[str, tuple[Any, Any]]:
        """Return config field -> (value at first, value after the last step)."""
        by_depth = {} if self.dropped_layers is None else self.dropped_layers.fields
        return {**by_depth, **changed(self.steps)}

    @property
    def perplexities(self) -> dict[str, tuple[float, float]]:
        """Return a text in words -> the perplexity on it before and after, for those measured."""
        measured = zip(TEXTS, (self.perplexity, self.perplexity_second_text), strict=True)
        return {text: values for text, values in measured if values is not None}

    def title(self) -> str:
        """Return the class, with the fields that changed."""
        from ..hook.report import in_words  # with torch, which no check of a job needs

        changes = (f"{n} {a} -> {b}" for n, (a, b) in in_words(self.fields).items())
        return f"{self.model}: {', '.join(changes)}"

    def lines(self) -> Iterator[str]:
        """Yield what it came to, and where it was written."""
        before, after = self.parameters
        if self.dropped_layers is not None:
            yield self.dropped_layers.title()
        yield f"parameters: {before:,} -> {after:,} ({after / before:.1%})"
        for text, (old, new) in self.perplexities.items():
            yield f"perplexity on {text}: {old:.1f} -> {new:.1f}"
        yield f"proof: {self.proof}"
        if self.copied.files:
            yield f"copied: {', '.join(self.copied.files)}"
        if self.copied.not_copied:
            yield f"not copied: {', '.join(self.copied.not_copied)}"
        yield from (f"note: {note}" for note in self.notes)
        if self.layers_differ is not None:
            yield (
                f"layers differ: {self.layers_differ.loading(str(self.out))} runs "
                f"{self.layers_differ.file}, written by tp-hf-config, which builds each layer by "
                "its own widths; tp-hf-config export gives forms without code"
            )
        yield f"written: {self.out} ({self.seconds:.0f} s)"

    def to_dict(self) -> dict[str, Any]:
        """Return the result for ``json.dumps``, with the fields that changed."""
        return {**super().to_dict(), "fields": old_and_new(self.fields)}


def changed(reports: tuple[SyncReport, ...]) -> dict[str, tuple[Any, Any]]:
    """Return config field -> (value before the first report, value after the last)."""
    changes: dict[str, tuple[Any, Any]] = {}
    for report in reports:
        for name, (old, new) in report.fields.items():
            changes[name] = (changes.get(name, (old,))[0], new)
    return changes


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
    fields: ByLayer
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
    fields: ByLayer
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
