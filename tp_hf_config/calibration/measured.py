"""Measure what every weight of a model reads, and measure again once the weights have changed.

Of all tokens, sums are kept of what the channels carry that the model's weights read.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..fieldmap.field_map import FieldMap
from ..graph.cut_list import stack_dim
from ..graph.experiments import experiments_of
from ..model.build import Refusal
from ..model.disk_cache import entry_key, load, store
from ..model.sharded import behind, reshard
from ..model.tensors import state_of
from ..reports import short
from .batches import Batch, tokens_in
from .linear_ops import Consumer, Contribution, ExpertOutputs, LinearOp
from .passes import ALONE, Ranks, memory_limit, watched_pass
from .sources import Chain, Sources, use_of

if TYPE_CHECKING:
    from typing_extensions import Self


TOKENS_PER_CHANNEL = 8  # refits need as many (12,288 tokens for 1,536 channels are enough)
_TOGETHER = 512  # tokens in a product; fewer cost as much: the whole Gram matrix is touched
_BLOCKS = 4  # block rows of a Gram matrix; blocks below the diagonal are mirrored


@dataclass
class InputStatistics:
    """Sums over the tokens that a consumer read."""

    tokens: int = 0  # how many
    # sum of each channel's squares, float64
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))
    # Sums of products of two channels, ``(channels, channels)``, in float32 (float64 for a float64
    # model); None: not measured.
    gram: Tensor | None = None
    _waiting: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def none_of(cls, channels: int) -> InputStatistics:
        return cls(0, torch.zeros(channels, dtype=torch.float64))

    def add(self, rows: Tensor, with_gram: bool) -> None:
        """Add tokens, shape ``(tokens, channels)``."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        squares = rows.square().sum(0).double().cpu()
        self.squares = self.squares + squares if self.tokens else squares
        self.tokens += len(rows)
        if with_gram:
            if self.gram is None:
                self.gram = rows.new_zeros(rows.shape[1], rows.shape[1])
            # a copy, because the model may change its activations in place
            self._waiting.append(rows.clone())
            if sum(map(len, self._waiting)) >= _TOGETHER:
                self._add_waiting(self.gram)

    def complete(self) -> None:
        """Fill in the lower triangle of the Gram matrix; nothing can be added afterwards."""
        if self.gram is None:
            return
        self._add_waiting(self.gram)
        lower = self.gram.triu_().T.tril(-1)
        self.gram.add_(lower)

    def _add_waiting(self, gram: Tensor) -> None:
        if self._waiting:
            _add_upper(gram, torch.cat(self._waiting))
            self._waiting = []

    @property
    def is_enough(self) -> bool:
        return self.shortage == 1

    @property
    def shortage(self) -> float:
        """How many times more tokens refits need; at least 1."""
        return max(1.0, TOKENS_PER_CHANNEL * len(self.squares) / max(1, self.tokens))

    @property
    def norms(self) -> Tensor:
        """Each channel's root mean square."""
        return (self.squares / max(1, self.tokens)).sqrt()


def _add_upper(gram: Tensor, rows: Tensor) -> None:
    """Add ``rowsᵀ rows`` to a Gram matrix, except for the blocks below the diagonal."""
    channels = rows.shape[1]
    step = max(64, -(-channels // _BLOCKS))
    for start in range(0, channels, step):
        block = slice(start, start + step)
        gram[block, start:].addmm_(rows[:, block].T, rows[:, start:])


@dataclass
class Readings:
    """What was measured. A leader is the first of the consumers that read the same values."""

    statistics: dict[Consumer, InputStatistics] = field(default_factory=dict)  # by leader
    leaders: dict[Consumer, Consumer] = field(default_factory=dict)  # consumer -> its leader
    # Leader -> the layers from a norm to what it reads; only leaders behind a norm.
    chains: dict[Consumer, Chain] = field(default_factory=dict)
    # Weights that embed tokens too (tied heads) where no batch has tokens: no refit could be judged
    unread: set[str] = field(default_factory=set)
    # Of consumers whose outputs are added up row by row, as experts' are; the last layer's last.
    experts: dict[Consumer, Contribution] = field(default_factory=dict)

    def of(self, consumer: Consumer) -> InputStatistics | None:
        leader = self.leaders.get(consumer)
        return None if leader is None else self.statistics.get(leader)

    def by_place(self) -> dict[tuple[str, int], list[Consumer]]:
        """Return (parameter, dimension) -> its consumers: one, or one for each expert."""
        places: dict[tuple[str, int], list[Consumer]] = {}
        for consumer in self.leaders:
            places.setdefault((consumer.parameter, consumer.dim), []).append(consumer)
        return places

    def needs_gram(self, leader: Consumer) -> bool:
        """True if a refit needs the Gram matrix; behind a norm, other products are needed."""
        return leader not in self.chains and leader.parameter not in self.unread


def added_up(own: Readings, apart: Set[Consumer], ranks: Ranks, limit: int) -> Readings:
    """Return the readings over all ranks' data; all ranks have to call this.

    A Gram matrix that exceeds ``limit`` bytes with the others, or that a rank did not measure, is
    left to another pass. ``apart``: consumers that shared their inputs with different leaders.
    """
    seen = {
        leader: (len(each.squares), None if each.gram is None else each.gram.dtype)
        for leader, each in own.statistics.items()
    }
    everyone = ranks.gathered((replace(own, statistics={}), apart, seen))
    merged, sizes = Readings(), dict[Consumer, int]()
    unsure = {consumer for _, some, _ in everyone for consumer in some}
    for readings, _, theirs in everyone:
        merged.unread |= readings.unread
        for consumer, contribution in readings.experts.items():
            merged.experts.setdefault(consumer, Contribution()).add(contribution)
        for consumer, leader in readings.leaders.items():
            if merged.leaders.setdefault(consumer, leader) != leader:
                unsure.add(consumer)
        for leader, (size, _) in theirs.items():
            if leader not in sizes and leader in readings.chains:
                merged.chains[leader] = readings.chains[leader]
            sizes.setdefault(leader, size)
    for consumer in unsure:
        merged.leaders.pop(consumer, None)
    measured = 0
    for leader, size in sizes.items():
        dtypes = [theirs[leader][1] for *_, theirs in everyone if leader in theirs]
        fits = None not in dtypes and (not measured or measured + 4 * size**2 <= limit)
        measured += 4 * size**2 if fits else 0
        statistics = own.statistics.pop(leader, None) or InputStatistics.none_of(size)
        merged.statistics[leader] = _summed(statistics, dtypes[0] if fits else None, ranks)
    return merged


def _summed(own: InputStatistics, dtype: torch.dtype | None, ranks: Ranks) -> InputStatistics:
    """Return one input's sums over all ranks; a dtype asks for a Gram matrix."""
    size = len(own.squares)
    tokens = torch.tensor([own.tokens], dtype=torch.float64)
    sums = ranks.summed(torch.cat([own.squares, tokens]))
    gram = None
    if dtype is not None:
        gram = torch.zeros(size, size, dtype=dtype, device=ranks.device)
        gram = ranks.summed(gram if own.gram is None else own.gram)
    return InputStatistics(int(sums[-1]), sums[:-1].clone(), gram)


RIDGE = 1e-2
# of models that write text: later text differs from calibration text (`docs/quality.md`)
TEXT_RIDGE = 1e-1
_REMEMBERED = 4  # inputs; weights that read the same values (q, k, v) run right after each other
# where in memory a weight's inputs lay, whether they still do, and the weight's leader
_Read = tuple[tuple[Any, ...], Callable[[], bool], Consumer]
_Need = Literal["gram", "products", ""]
_Place = tuple[str, int, bool, _Need]
_UNKNOWN = Consumer("", 0)


class Measuring:
    """Adds up what consumers read in one pass.

    ``limit``: bytes for all Gram matrices. ``only``: leaders that get one; ``None``: all that need
    one. Unless ``whole``, the last operation runs on one token: heads of large vocabularies are
    slow, and nothing measured reads their results.
    """

    def __init__(
        self, sources: Sources, limit: int, only: Collection[Consumer] | None, whole: bool
    ):
        self.readings = Readings()
        self.experts = ExpertOutputs(self.readings.experts)
        self._sources, self._limit, self._only = sources, limit, only
        self._grams: dict[Consumer, int] = {}  # their bytes
        self._recent: deque[_Read] = deque(maxlen=_REMEMBERED)
        self._apart: set[Consumer] = set()
        self._ran: list[Consumer] = []  # in this batch
        self._last = None if whole else _UNKNOWN
        self._ended = False
        self.ended_early = False  # operations followed the one taken for the last: all are wrong

    def visit(self, op: LinearOp) -> Any:
        leader = self._leader(op)
        readings = self.readings
        if readings.leaders.setdefault(op.consumer, leader) != leader:
            self._apart.add(op.consumer)  # it shares its inputs with other consumers than before
        if leader == op.consumer:
            if leader not in readings.statistics:
                self._begin(op)
            readings.statistics[leader].add(op.channels_last(), leader in self._grams)
        self.ended_early |= self._ended
        self._ran.append(op.consumer)
        if op.consumer == self._last and op.inputs.ndim == 3 and op.axis == 2:
            return self._of_one_token(op)
        return op.run()

    def end_batch(self, number: int, result: Any) -> None:
        if self._last is _UNKNOWN and self._ran:
            last = self._ran[-1]
            self._last = last if self._ran.count(last) == 1 and last.part is None else None
        self._ran, self._ended = [], False

    def _of_one_token(self, op: LinearOp) -> Any:
        """Return a result of the right shape, computed for the first token only."""
        tokens = op.inputs.shape[1]
        result = op.run(op.inputs[:, :1])
        if result.shape[:-1] != (len(op.inputs), 1):
            return op.run()
        self._ended = True
        return result.expand(-1, tokens, -1).contiguous()  # the model may change it in place

    def complete(self, ranks: Ranks) -> Readings:
        readings = self.readings
        for consumer in self._apart:
            readings.leaders.pop(consumer, None)
        for statistics in readings.statistics.values():
            statistics.complete()
        return added_up(readings, self._apart, ranks, self._limit) if ranks.own_data else readings

    def _begin(self, op: LinearOp) -> None:
        readings, consumer = self.readings, op.consumer
        readings.statistics[consumer] = InputStatistics()
        chain = self._sources.chain_of(op.inputs, op.axis)
        if chain:
            readings.chains[consumer] = chain
        if op.is_unread:
            readings.unread.add(consumer.parameter)
        size = 4 * op.inputs.shape[op.axis] ** 2
        wanted = readings.needs_gram(consumer) if self._only is None else consumer in self._only
        if wanted and (not self._grams or sum(self._grams.values()) + size <= self._limit):
            self._grams[consumer] = size

    def _leader(self, op: LinearOp) -> Consumer:
        """Return the consumer that has just read the same values, or the operation's own."""
        inputs = op.inputs
        storage = inputs.untyped_storage().data_ptr(), inputs.storage_offset(), inputs._version
        place = (*storage, inputs.numel(), inputs.shape[op.axis])  # equal for views of one tensor
        for other, in_use, leader in self._recent:
            if other == place and in_use():  # else the memory holds other values now
                return leader
        self._recent.append((place, use_of(inputs), op.consumer))
        return op.consumer


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    max_memory: int | None,
    what: str,
    ranks: Ranks = ALONE,
    grams: bool = True,
) -> Readings:
    """Return what every weight of a model reads, measured in one pass.

    Gram matrices that ``max_memory`` has no room for (all, without ``grams``) wait for
    :func:`_add_grams`.
    """
    only = None if grams else ()
    readings = _measured(model, batches, max_memory, what, ranks, only)
    if not readings.statistics:
        raise CalibrationError(
            f"{type(model).__name__} has no layer whose inputs can be measured; expected linear "
            "layers, convolutions or experts"
        )
    _check_finite(readings)
    return readings


def _add_grams(
    model: nn.Module,
    batches: Sequence[Batch],
    readings: Readings,
    leaders: Collection[Consumer],
    max_memory: int | None,
    ranks: Ranks = ALONE,
) -> None:
    """Replace all Gram matrices by those of ``leaders``, as many as fit, in another pass."""
    for statistics in readings.statistics.values():
        statistics.gram = None
    if ranks.count > 1:  # chosen beforehand: ranks reach experts in different orders
        sizes = {each: 4 * len(readings.statistics[each].squares) ** 2 for each in leaders}
        leaders = that_fit(sizes, memory_limit(model, max_memory, ranks))
    what = "calibrate, another pass"
    again = _measured(model, batches, max_memory, what, ranks, leaders)
    for leader, measured in again.statistics.items():
        if leader in readings.statistics:
            readings.statistics[leader].gram = measured.gram


def that_fit(sizes: Mapping[Consumer, int], limit: int) -> list[Consumer]:
    """Return the consumers whose sums fit into ``limit`` bytes, at least the first."""
    chosen: list[Consumer] = []
    for consumer, size in sizes.items():
        if size <= limit or not chosen:
            chosen.append(consumer)
            limit -= size
    return chosen


def _measured(
    model: nn.Module,
    batches: Sequence[Batch],
    max_memory: int | None,
    what: str,
    ranks: Ranks,
    only: Collection[Consumer] | None = None,
) -> Readings:
    for whole in (False, True):
        sources = Sources(model)
        measuring = Measuring(sources, memory_limit(model, max_memory, ranks), only, whole)
        visit, after, experts = measuring.visit, measuring.end_batch, measuring.experts
        watched_pass(model, batches, visit, sources, after, what, ranks, experts)
        if not any(ranks.gathered(measuring.ended_early)):
            break
    return measuring.complete(ranks)


def _check_finite(readings: Readings) -> None:
    for consumer, statistics in readings.statistics.items():
        if not torch.isfinite(statistics.squares).all():
            raise CalibrationError(
                f"{consumer.parameter} reads values that are not finite on the calibration data. "
                "Load the model in float32 or bfloat16, and check that it runs on this data"
            )


class MeasuredModel:
    """Base of Calibration, which describes the fields."""

    def __init__(
        self,
        model: nn.Module,
        train: Sequence[Batch],
        held_out: Sequence[Batch],
        ridge: float = RIDGE,
        max_memory: int | None = None,
        ranks: Ranks = ALONE,
        refits: bool = True,
    ):
        self.ranks, self.refits = ranks, refits
        self.model, self.train, self.held_out = model, list(train), list(held_out)
        self.ridge, self.max_memory = ridge, max_memory
        self.readings = Readings()
        # mean products of the gradients of what consumers read, for importances
        self.gradients: dict[Consumer, Tensor] = {}
        # sums of squares of what parameters write, by channel, for importances
        self.written: dict[str, Tensor] = {}
        self.seconds = 0.0
        self._measured_at: tuple[Any, ...] = ()

    def on_copy(self, model: nn.Module) -> Self:
        """Return what was measured for a copy of the model, without another pass over the data.

        Args:
            model: a copy with the same weights (``copy.deepcopy(model)``).

        Raises:
            CalibrationError: the weights differ.
        """
        readings = self.current()
        own, other = self.model.state_dict(), model.state_dict()
        if own.keys() != other.keys() or not all(
            own[name].shape == other[name].shape and torch.equal(own[name], other[name])
            for name in own
        ):
            raise CalibrationError(
                f"this {type(model).__name__} is not a copy of the {type(self.model).__name__} "
                "that was measured: its weights differ. Calibrate this model: calibrate(model, ...)"
            )
        measured = copy.copy(self)
        measured.model = model
        measured.readings = replace(
            readings, statistics={k: copy.copy(v) for k, v in readings.statistics.items()}
        )
        measured._measured_at = state_of(model)
        return measured

    def comparing_on(self, held_out: Sequence[Batch]) -> Self:
        self.current()
        measured = copy.copy(self)
        measured.held_out = list(held_out)
        return measured

    def check_measures(self, model: nn.Module) -> None:
        """Check that this model, or one it is a part of, was measured.

        Raises:
            CalibrationError: another one was.
        """
        measured = {id(parameter) for parameter in self.model.parameters()}
        if not all(id(parameter) in measured for parameter in model.parameters()):
            raise CalibrationError(
                f"the calibration was measured on another model than the {type(model).__name__} "
                "that the pruner prunes. Calibrate this model: calibrate(model, ...)"
            )

    def current(self) -> Readings:
        """Return the sums; measure first if the weights have changed."""
        model = behind(self.model)
        reshard(model)
        state = state_of(model)
        if state != self._measured_at:
            started = time.perf_counter()
            again = "calibrate again" if self._measured_at else "calibrate"
            self.readings = Readings()  # frees the old Gram matrices
            self.gradients, self.written = {}, {}
            self.readings = measure(
                self.model, self.train, self.max_memory, again, self.ranks, self.refits
            )
            self.seconds = time.perf_counter() - started
            self._measured_at = state
        return self.readings

    def require(self, leaders: Collection[Consumer]) -> list[Consumer]:
        """Return those of the leaders, from the first on, that have Gram matrices now.

        If the first has none, another pass measures it, and as many others as fit into memory.
        """
        readings = self.current()
        wanted = [leader for leader in leaders if leader in readings.statistics]
        if wanted and readings.statistics[wanted[0]].gram is None:
            _add_grams(self.model, self.train, readings, wanted, self.max_memory, self.ranks)
        return [leader for leader in wanted if readings.statistics[leader].gram is not None]

    def require_all(self, leaders: Collection[Consumer]) -> bool:
        """True if all leaders have Gram matrices now, if need be after another pass."""
        statistics = self.current().statistics
        missing = [leader for leader in leaders if statistics[leader].gram is None]
        wanted = dict.fromkeys([*missing, *leaders])
        return len(self.require(wanted)) == len(wanted)

    @property
    def tokens(self) -> int:
        """The number of tokens measured on this rank; of images and sounds, the rows."""
        return tokens_in(self.train)

    def holds_out(self) -> bool:
        """True if any rank holds out a batch; all ranks have to call this."""
        return any(self.ranks.gathered(len(self.held_out)))

    @property
    def memory(self) -> int:
        """The bytes of the Gram matrices."""
        found = (one.gram for one in self.readings.statistics.values())
        return sum(gram.nbytes for gram in found if gram is not None)

    def __str__(self) -> str:
        inputs = len(self.readings.statistics)
        what = f"{type(self.model).__name__} on {self.tokens:,} tokens"
        if self.ranks.own_data:
            what += f" (of {self.ranks.count} ranks, this one)"
        if not self._measured_at:
            return f"{what}: not measured yet"
        return (
            f"{what}: {inputs} inputs of {len(self.readings.leaders)} weights measured; "
            f"{self.memory / 2**20:,.0f} MiB, {self.seconds:.1f} s"
        )

    def __repr__(self) -> str:
        return short(self, str(self))


@dataclass(frozen=True)
class Input:
    parameter: str  # its first name
    dim: int
    parts: int  # matrices that it stacks (experts); 1: no stack
    # What a refit needs: "gram"; "products" behind a norm (of the kept channels); "": nothing,
    # because another weight reads the same or no input was looked up in this one.
    sums: _Need


def gram_bytes(field_map: FieldMap, full: nn.Module) -> int | None:
    """Return what ``calibrate(model).memory`` will be; ``None``: the tiny model does not run.

    It is less if a matrix does not fit into memory or an expert gets no token.
    """
    inputs = inputs_of(field_map, full)
    if inputs is None:
        return None
    return sum(
        4 * each.parts * int(full.get_parameter(each.parameter).shape[each.dim]) ** 2
        for each in inputs
        if each.sums == "gram"
    )


def inputs_of(field_map: FieldMap, full: nn.Module) -> list[Input] | None:
    """Return what every weight of ``full`` (on any device) reads, from a pass of the tiny model."""
    key = None
    if field_map.digest is not None:
        key = entry_key(field_map.digest, "what weights read", field_map.data)
    places: list[_Place] | None = None if key is None else load(key)
    if places is None:
        places = _places(field_map)
        if key is not None and places is not None:
            store(key, places)
    return None if places is None else [*_at_full_size(field_map, full, places)]


def _places(field_map: FieldMap) -> list[_Place] | None:
    tiny = experiments_of(field_map).tiny
    if isinstance(tiny, Refusal):
        return None
    try:
        readings = measure(tiny.model, [tiny.inputs], None, what="")
    except CalibrationError:
        return None
    first = field_map.depth.first
    return sorted(
        {
            (first(c.parameter), c.dim, c.part is not None, _sums_of(c, readings))
            for c in readings.leaders
        }
    )


def _sums_of(consumer: Consumer, readings: Readings) -> _Need:
    if readings.leaders[consumer] != consumer or consumer.parameter in readings.unread:
        return ""
    return "gram" if readings.needs_gram(consumer) else "products"


def _at_full_size(
    field_map: FieldMap, full: nn.Module, places: Iterable[_Place]
) -> Iterator[Input]:
    by_name: dict[str, list[_Place]] = {}
    for place in places:
        by_name.setdefault(place[0], []).append(place)
    for name, parameter in full.named_parameters():
        for _, dim, stacked, sums in by_name.get(field_map.depth.canonical(name), ()):
            parts = parameter.shape[stack_dim(parameter, dim)] if stacked else 1
            yield Input(name, dim, parts, sums)
