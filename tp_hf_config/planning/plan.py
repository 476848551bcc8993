"""Show a plan as text, table, HTML and JSON; ``make_plan`` computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from ..calibration.batches import TOKENS, WINDOW
from ..calibration.measured import gram_bytes, inputs_of
from ..errors import ConfigSyncError, UnsupportedModelError
from ..fieldmap.field_map import FieldMap
from ..fieldmap.model_view import view_of
from ..forward.find_recipe import dry_pass
from ..forward.run_recipe import MakeInputs
from ..model.build import Refusal
from ..model.config_json import FieldPath
from ..model.layer_entries import name_in_all_layers
from ..reports import MOST_LINES, Report, Rows, fields_as_json, short
from .quantised import QuantisedSize
from .settings import PruneSettings
from .trajectory import PlannedRefusal


@dataclass(frozen=True)
class PlannedWidth:
    """One width: what was asked for, what it will be, what it could be.

    Attributes:
        name: the names of its config fields.
        before: field -> value now.
        steps: for each step, field -> value after it.
        asked: the ratio that was asked for.
        reached: the share of the units that will be removed.
        reachable: the values that its first field can reach while all other fields keep theirs;
            head counts only if the class accepts them.
        multiple: the largest of 256, 128, 64, 32, 16, 8 and 1 that divides the pruned dimensions
            (of heads: their channels) in every layer.
        parameters: number of parameters of one unit.
    """

    name: str
    before: dict[str, int]
    steps: tuple[dict[str, int], ...]
    asked: float
    reached: float
    reachable: Sequence[int]
    multiple: int
    parameters: int

    def __repr__(self) -> str:
        ways = (f"{name}: {old:,} -> {self.after[name]:,}" for name, old in self.before.items())
        return short(self, ", ".join(ways))

    @property
    def after(self) -> dict[str, int]:
        """Field -> value after the last step."""
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
        kept: the name of each other width -> why it is kept.
        before: the size now.
        after: the size in the end; ``None`` if the class refuses the widths.
        refusal: why the settings cannot be carried out; ``None`` if they can.
        adjusted: lines on steps at which the class refuses what is asked for, with what is done
            instead, and on widths that lose less than their ratio asks for, with the reason.
        grid: the widths that end at a multiple of 64, 32, 16 or 8 near what is asked for; ``None``
            if none does.
        unmet: for each tool of ``target=`` that does not take all widths, what happens, and which
            widths near it would do.
        quantised: sizes of the files in the formats of ``target=``; without it, in GGUF's Q4_K_M,
            if pruning makes them larger, or the quantiser then refuses the model.
        target: the number of parameters asked for; ``None`` if none was.
        why_not_exactly: why fewer are left; ``None`` if they are not.
        tokens: True: FLOPs are counted for each token; else for each input (an image, a recording).
        notes: further notes for the user.
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
    grid: str | None = None
    unmet: tuple[str, ...] = ()
    quantised: tuple[QuantisedSize, ...] = ()
    target: int | None = None
    why_not_exactly: str | None = None
    tokens: bool = True
    notes: tuple[str, ...] = ()
    time: WorkingTime | None = None
    most_lines, columns = MOST_LINES, 100
    _fields: dict[FieldPath, int] = field(default_factory=dict, repr=False, compare=False)
    _make_inputs: MakeInputs | None = field(default=None, repr=False, compare=False)

    @property
    def values(self) -> dict[str, int]:
        """Field -> value in the end, for every field that is pruned."""
        return {name: value for width in self.widths for name, value in width.after.items()}

    @property
    def make_inputs(self) -> MakeInputs | None:
        """The user's function that makes a forward pass's inputs, if there is one."""
        return self._make_inputs

    def of_pruner(self) -> dict[str, Any]:
        """Return the pruner's arguments that carry the plan out."""
        of_hook = ("prune", "ratios", "gqa", "per_layer", "target")
        given = vars(self.settings).items()
        return {name: value for name, value in given if name not in of_hook and value is not None}

    def check_fits(self, model: nn.Module) -> None:
        """Check that the plan was made for a model of this class and config, which accepts it.

        Raises:
            ConfigSyncError: the class refuses what is planned.
            UnsupportedModelError: the model has another class or config.
        """
        if self.refusal is not None:
            raise ConfigSyncError(
                f"this plan of {self.model} cannot be carried out: {self.refusal}"
            )
        # the caller has listed an entry for each layer if layers may differ (layers_listed)
        view = view_of(model, self.make_inputs)
        name = type(view.model).__name__
        if name != self.model or view.field_map.values != self._fields:
            raise UnsupportedModelError(
                f"this plan was made for a {self.model} with another config than that of this "
                f"{name}. Make a new one: tp_hf_config.plan(model, ...)."
            )

    def title(self) -> str:
        """Return the name of the class."""
        return self.model

    def rows(self) -> Rows:
        """Return a row for each width; layers that are pruned alike share one."""
        cells = ((width.name, _cells(width)) for width in self.widths)
        return [_HEAD, *((name, *row) for name, row in _by_layers(cells))]

    def lines(self) -> list[str]:
        """Return a refusal, the sizes before and after, what was adjusted, notes and the time."""
        parameters, size, flops, _ = _sizes(self)
        refused = [] if self.refusal is None else [str(self.refusal)]
        notes = (f"note: {note}" for note in self.notes)
        time = [] if self.time is None else [f"estimated time on two CPU cores: {self.time}"]
        grid = [] if self.grid is None else [self.grid]
        sizes = map(str, self.quantised)
        told = [*self.adjusted, *grid, *sizes, *self.unmet, *notes]
        return [*refused, *_target(self), parameters, *told, size, flops, *time]

    def details(self) -> Iterator[str]:
        """Yield the memory to calibrate, and why the other widths are kept."""
        yield list(_sizes(self))[-1]
        yield from (f"kept: {name}: {why}" for name, why in _by_layers(self.kept.items()))

    def __repr__(self) -> str:
        after = "refused" if self.after is None else f"{self.after.parameters:,} parameters"
        widths = f"{len(self.widths)} width{'' if len(self.widths) == 1 else 's'}"
        return short(self, f"{self.model}: {widths}, {self.before.parameters:,} -> {after}")


T = TypeVar("T")
_HEAD = ("config field", "now", "planned", "ratio", "can be", "multiple")


def described(values: Sequence[int]) -> str:
    """Describe values briefly: ``64, 128 .. 8,192``, ``1 to 8,192``."""
    if isinstance(values, range) and len(values) > 4:
        between = " to" if values.step == 1 else f", {values[1]:,} .."
        return f"{values[0]:,}{between} {values[-1]:,}"
    return ", ".join(f"{value:,}" for value in values)


def _by_layers(widths: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield names of widths and what is said of them, once for layers of which it is the same."""
    alike: dict[tuple[str, T], list[str]] = {}
    for name, said in widths:
        alike.setdefault((name_in_all_layers(name), said), []).append(name)
    for (shared, said), names in alike.items():
        yield (names[0] if len(names) == 1 else f"{shared} (of {len(names)} layers)"), said


def _cells(width: PlannedWidth) -> tuple[str, ...]:
    steps = ([f"{step[name]:,}" for step in width.steps] for name in width.before)
    ways = (" -> ".join(n if len(n) < 3 else (n[0], "...", n[-1])) for n in steps)
    return (
        " + ".join(f"{value:,}" for value in width.before.values()),
        " + ".join(ways),
        f"{width.reached:.3f} of {width.asked:g}",
        described(width.reachable),
        str(width.multiple),
    )


def _sizes(plan: Plan) -> Iterator[str]:
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


def _target(plan: Plan) -> Iterator[str]:
    """Yield the target and the ratios that reach it, the common one of all widths first."""
    if plan.target is None or plan.after is None:
        return
    given = plan.settings
    asked = {w.asked for w in plan.widths if not w.before.keys() & given.ratios.keys()}
    ratios = [f"one ratio of {given.pruning_ratio:g}"] * (given.pruning_ratio in asked)
    if given.head_pruning_ratio in asked - {given.pruning_ratio}:
        ratios.append(f"a head ratio of {given.head_pruning_ratio:g}")
    ratios += [f"{name} {ratio:g}" for name, ratio in given.ratios.items()]
    why = "" if plan.why_not_exactly is None else f"; {plan.why_not_exactly}"
    number = f"{plan.after.parameters:,} at {', '.join(ratios)}"
    yield f"target of {plan.target:,} parameters: {number}{why}"


_TOKENS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Size:
    """How large a model is and what it computes.

    Attributes:
        parameters: number of parameters; tied ones count once.
        bytes: of the parameters and saved buffers, in the model's dtype.
        flops: FLOPs of a forward pass for each token (of a short text) or other input; ``None`` if
            the class does not run on the meta device.
        gram_bytes: bytes of the Gram matrices that ``calibrate`` keeps if memory has room for all;
            ``None`` if the class does not run at tiny widths.
    """

    parameters: int
    bytes: int
    flops: int | None
    gram_bytes: int | None


def size_of(field_map: FieldMap, full: nn.Module) -> tuple[Size, tuple[str, ...]]:
    """Return the size, and a note if the FLOPs are unknown."""
    saved: list[torch.Tensor] = list(full.parameters())
    for module in full.modules():
        hidden = module._non_persistent_buffers_set
        saved += [b for key, b in module._buffers.items() if b is not None and key not in hidden]
    flops = flops_of(field_map, full)
    size = Size(
        parameters=sum(parameter.numel() for parameter in full.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in saved),
        flops=None if isinstance(flops, Refusal) else flops,
        gram_bytes=gram_bytes(field_map, full),
    )
    if not isinstance(flops, Refusal):
        return size, ()
    why = f"because the class does not run on the meta device: {flops.reason}"
    return size, (f"FLOPs are unknown, {why}",)


def flops_of(field_map: FieldMap, full: nn.Module) -> int | Refusal:
    """Return the FLOPs of a model on the meta device, per token or input."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    ran = dry_pass(full, field_map.recipe, counter)
    if isinstance(ran, Refusal):
        return ran
    if ran.guessed:
        return Refusal("what it computes depends on the values of tensors")
    tokens = sum(ran.inputs[name].numel() for name in _TOKENS if name in ran.inputs)
    return int(counter.get_total_flops() // max(1, tokens))


class ParameterCount:
    def __init__(self, field_map: FieldMap, full: nn.Module):
        self.field_map = field_map
        self._kinds = Counter(
            (field_map.depth.canonical(name), tuple(parameter.shape))
            for name, parameter in full.named_parameters()
        )

    def at(self, values: Mapping[FieldPath, int]) -> int:
        changes = {field: value - self.field_map.values[field] for field, value in values.items()}
        total = 0
        for (name, shape), number in self._kinds.items():
            for dim, size in enumerate(shape):
                expression = self.field_map.expression_of(name, dim)
                if expression is not None and expression.fields & changes.keys():
                    number *= int(expression.evaluate(changes))
                else:
                    number *= size
            total += number
        return total


RATE = 140e9  # float32 operations a second on two CPU cores (`benchmarks/working_time.py`)
_HELD_OUT = 8 * WINDOW  # tokens
_PASSES = 4  # over held-out data: unpruned, cut, refitted, pruned
_UPPER = 5 / 8  # share of a Gram matrix that is computed: the upper triangle, in blocks
_DOUBLE = 2  # float32 operations in the time of one in float64


@dataclass(frozen=True)
class WorkingTime:
    """Estimated seconds in memory on two CPU cores; experts take longer.

    ``calibrate`` is on the default number of tokens; ``step`` is one step with refits.
    """

    calibrate: float
    step: float

    def __str__(self) -> str:
        return f"{_said(self.calibrate)} to calibrate, {_said(self.step)} for a step with refits"


def working_time(
    field_map: FieldMap, full: nn.Module, after: nn.Module, steps: int, flops: int | None
) -> WorkingTime | None:
    """Return how long it takes; ``None``: the FLOPs or what weights read are unknown."""
    inputs = inputs_of(field_map, full)
    if inputs is None or flops is None:
        return None
    grams, products = 0.0, 0
    step: float = _PASSES * _HELD_OUT * flops
    for each in (each for each in inputs if each.sums):
        size, end = (m.get_parameter(each.parameter).shape[each.dim] for m in (full, after))
        kept = size - (size - end) // steps
        if each.sums == "gram":
            grams += 2 * _UPPER * size**2
        if kept == size:
            continue
        if each.sums == "products":
            products += 2 * kept * (kept + size)
        targets = size if each.sums == "products" else size - kept
        step += _DOUBLE * each.parts * (kept**3 / 3 + 2 * kept**2 * targets)
    if products:
        step += TOKENS * (flops + products)
    return WorkingTime(TOKENS * (flops + grams) / RATE, step / RATE)


def _said(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"about {seconds / size:.2g} {unit}"
    return f"about {max(1.0, seconds):.2g} s"
