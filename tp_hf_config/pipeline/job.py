"""A job's settings, its result and that of an export, and what is shown meanwhile. No torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..errors import PipelineError, as_range
from ..reports import MOST_LINES, Report, old_and_new
from .source import Source

if TYPE_CHECKING:
    from ..hook.drop_layers import DroppedLayers
    from ..hook.report import SyncReport
    from ..planning.allocate import Allocation
    from ..planning.plan import Plan
    from ..planning.quantised import QuantisedSize
    from .proofs import Proof, SameOutputs, SameTensors
    from .speed import Speed

T = TypeVar("T")
Ranking = Literal["local", "global", "isomorphic"]
Importance = Literal["auto", "wanda", "activation", "curvature", "magnitude", "random"]
Format = Literal["padded", "decilm", "gguf"]  # what a model can be exported to
# config field -> its values by layer before and after
ByLayer = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
# on which perplexity is measured
HELD_OUT = "held-out text of the calibration file"
SECOND_TEXT = "a second text, not used for calibration"


def show(what: object) -> None:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with suppress(OSError):  # the work goes on
        tqdm.write(str(what), file=sys.stderr)
        sys.stderr.flush()


def track(items: Iterable[T], total: int, what: str, unit: str = "windows") -> Iterator[T]:
    """Yield the items, ``total`` of them, and show how many are done."""
    from tqdm.auto import tqdm

    show(f"{what}: {total} {unit}")
    yield from tqdm(items, what, total, leave=False, unit=unit, disable=None)


@dataclass(frozen=True)
class Job:
    """What to prune, how, and where to write the result."""

    source: Source
    out: Path
    widths: Mapping[str, Any]  # arguments of plan(); none: only layers are dropped
    importance: Importance | None = None  # None: auto if there is a text, else magnitude
    # None: the shipped text for a causal language model
    calibration: Path | Literal["own"] | None = None
    recover: int = 0  # updates of distillation from the unpruned model, spread over the steps
    device: str = "cpu"
    dtype: str | None = None  # None: as stored
    refit: bool = True  # if there is a text
    seed: int = 0
    max_shard_size: str | None = None
    overwrite: bool = False
    drop_layers: int = 0  # layers of least influence to drop before widths are pruned
    drop_from: str | None = None  # the list of layers to drop from, if the model has several
    # put computed weights into mapped files; None: if the model is large (is_large)
    stream: bool | None = None
    ranking: Ranking = "local"  # rank units by layer, globally, or across layers of one structure
    allocate: bool = False  # find each layer's width by sensitivity, for the target in widths
    tokens: int | None = None  # to measure on; None: the default of calibrate
    measure_speed: bool = False  # before and after
    command: str = ""  # the typed command line, for the model card

    @property
    def per_layer(self) -> bool:
        return bool(self.widths.get("per_layer"))

    @property
    def steps(self) -> int:
        return int(self.widths.get("iterative_steps", 1))


def calibration_text(job: Job) -> str | None:
    path = job.calibration
    if path is None or path == "own":
        return None
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PipelineError(
            f"{path}: expected plain text in UTF-8, found another encoding at byte {error.start:,}"
        ) from error
    except OSError as error:
        raise PipelineError(f"{path}: calibration text cannot be read: {error.strerror}") from error
    if not text.strip():
        raise PipelineError(f"{path}: the calibration text is empty")
    return text


@dataclass(frozen=True)
class Copied:
    """The names of the files that were copied, and of those that were not.

    Attributes:
        files: the files that were copied.
        not_copied: the other files, except weights, hidden files and files that are written anew.
        notes: further notes for the user.
    """

    files: tuple[str, ...]
    not_copied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layerwise:
    """How a saved model whose layers differ is loaded."""

    widths: Mapping[str, tuple[Any, ...]]  # config field -> its value in each layer
    auto_class: str  # its from_pretrained loads the model
    file: str

    def loading(self, folder: str) -> str:
        return f'{self.auto_class}.from_pretrained("{folder}", trust_remote_code=True)'


@dataclass(frozen=True, repr=False)
class Pruned(Report):
    """The result of a job; ``str`` gives a few lines of text."""

    model: str
    out: Path
    plan: Plan | None  # None if only layers were dropped
    steps: tuple[SyncReport, ...]
    parameters: tuple[int, int]
    proof: Proof
    copied: Copied
    # text, of those measured -> before and after
    perplexity: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    speed: tuple[Speed, Speed] | None = None  # before and after, if it was asked for
    notes: tuple[str, ...] = ()
    # in the target's formats; without one, in GGUF's Q4_K_M if pruning makes the file larger
    quantised: tuple[QuantisedSize, ...] = ()
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)  # what was done, by name
    dropped_layers: DroppedLayers | None = None
    allocation: Allocation | None = None  # None if there was a plan
    layers_differ: Layerwise | None = None  # None if they do not
    most_lines = MOST_LINES

    @property
    def fields(self) -> dict[str, tuple[Any, Any]]:
        """Config field -> (value at first, value after the last step)."""
        changes = {} if self.dropped_layers is None else dict(self.dropped_layers.fields)
        widths: dict[str, tuple[Any, Any]] = {}
        for name, (old, new) in chain(*(report.fields.items() for report in self.steps)):
            widths[name] = widths.get(name, (old,))[0], new
        return changes | widths

    def title(self) -> str:
        from ..hook.report import in_words  # imports torch, which checks do not need

        changes = ", ".join(f"{n} {a} -> {b}" for n, (a, b) in in_words(self.fields).items())
        return f"{self.model}: {changes}"

    def lines(self) -> Iterator[str]:
        before, after = self.parameters
        if self.dropped_layers is not None:
            yield self.dropped_layers.title()
        yield f"parameters: {before:,} -> {after:,} ({after / before:.1%})"
        for text, (old, new) in self.perplexity.items():
            yield f"perplexity on {text}: {old:.1f} -> {new:.1f}"
        if self.speed is not None:
            yield self.speed[0].then(self.speed[1])
        yield from map(str, self.quantised)
        yield f"proof: {self.proof}"
        if left := self.copied.not_copied:
            yield f"not copied: {', '.join(left)}"
        yield from (f"note: {note}" for note in self.notes)
        if self.layers_differ is not None:
            yield (
                f"layers differ: {self.layers_differ.loading(str(self.out))} runs "
                f"{self.layers_differ.file}, written by tp-hf-config, which builds each layer with "
                "its own widths; tp-hf-config export writes formats that need no code"
            )
        yield f"written: {self.out} ({self.seconds:.0f} s)"
        if self.copied.files:
            yield f"copied: {', '.join(self.copied.files)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the result for ``json.dumps``, with the fields that changed."""
        perplexity = {
            text: {"before": before, "after": after}
            for text, (before, after) in self.perplexity.items()
        }
        fields = old_and_new(self.fields)
        return {**super().to_dict(), "fields": fields, "perplexity": perplexity}


@dataclass(frozen=True)
class Written:
    """What an export wrote, and its proof."""

    parameters: int
    proof: SameOutputs | SameTensors
    fields: ByLayer  # those that were padded, or by which layers differ
    loading: str  # how it is loaded, for the model card


@dataclass(frozen=True, repr=False)
class Exported(Report):
    """The result of an export; ``str`` gives a few lines of text.

    Attributes:
        model: the name of the stock class.
        to: the format.
        out: the folder that was written.
        fields: config field -> its value in each layer before and after.
        parameters: the number of parameters before and after.
        proof: the comparison of the outputs before and after; for a stock class in a GGUF file, of
            the tensors with those read back.
        copied: the files that were copied, and those that were not.
        loading: how it is loaded.
        notes: further notes for the user.
        seconds: wall-clock time.
    """

    model: str
    to: str
    out: Path
    fields: ByLayer
    parameters: tuple[int, int]
    proof: SameOutputs | SameTensors
    copied: Copied
    loading: str
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def widths(self) -> dict[str, tuple[str, str]]:
        """Config field -> its values before and after, as text: ``768..1536``."""
        return {name: (as_range(old), as_range(new)) for name, (old, new) in self.fields.items()}

    def title(self) -> str:
        """Return the class and the format, with the widths that changed."""
        widths = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.widths.items())
        return f"{self.model}, {self.to}: {widths or 'all layers alike'}"

    def lines(self) -> Iterator[str]:
        """Yield the parameters, the proof, the files and the notes."""
        before, after = self.parameters
        yield f"parameters: {before:,} -> {after:,}"
        yield f"proof: {self.proof}"
        if self.copied.files:
            yield f"copied: {', '.join(self.copied.files)}"
        yield from (f"note: {note}" for note in self.notes)
        yield f"written: {self.out} ({self.seconds:.0f} s)"
