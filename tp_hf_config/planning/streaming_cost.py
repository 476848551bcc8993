"""Foretell what it takes to prune a model from folder to folder, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
from torch import nn

from ..calibration.batches import TOKENS, WINDOW
from ..calibration.forecast import Input, inputs_of
from ..fieldmap.field_map import FieldMap
from ..forward.lockstep import stages_of
from ..model.config_json import FieldPath

_PROCESS = 600 * 2**20  # bytes that a process with torch and Transformers has
_COPIES = 3  # of the largest tensor: as read, as cut, and as its importance is computed
_PASSES_OF_STEP = 5  # what weights read; each refit, the plain cut and all refits tried; the result
_ACTIVATIONS = 16  # bytes for each number of the widest: as computed, in float32, and a copy


@dataclass(frozen=True)
class StreamingCost:
    """What ``tp-hf-config prune --stream`` takes, in bytes.

    Attributes:
        read: read from the model's files: for the importances, for the cut, and for the proof.
        written: written to files.
        memory: the most that the process holds.
        scratch: the most that temporary files take.
    """

    read: int
    written: int
    memory: int
    scratch: int = 0

    def __str__(self) -> str:
        files = f", {self.scratch:,} in temporary files" if self.scratch else ""
        return (
            f"{self.read:,} bytes read, {self.written:,} written, {self.memory:,} in memory{files}"
        )

    def to_dict(self) -> dict[str, int]:
        """Return the cost as a dict for ``json.dumps``."""
        return asdict(self)


@dataclass(frozen=True)
class Cut:
    """What a plan comes to, for its cost.

    Attributes:
        field_map: the field map of the class.
        full: the class with all layers, on the meta device.
        after: the same in the end.
        widths: the fields of each width that is pruned.
        steps: the number of steps; each ranks anew.
        bytes_after: the bytes of the pruned model.
    """

    field_map: FieldMap
    full: nn.Module
    after: nn.Module
    widths: Sequence[Collection[FieldPath]]
    steps: int
    bytes_after: int

    def ranked(self, name: str, dim: int) -> int:
        """Return how many widths have a tensor dim."""
        fields = self.field_map.fields_of(name, dim)
        return sum(bool(fields & set(width)) for width in self.widths)


def streaming_cost(cut: Cut) -> StreamingCost:
    """Return what pruning a model by magnitude takes, folder to folder."""
    full = cut.full
    matrices = {
        name: parameter for name, parameter in full.named_parameters() if parameter.ndim > 1
    }
    ranked = sum(
        parameter.nbytes * cut.ranked(name, dim)
        for name, parameter in matrices.items()
        for dim in range(parameter.ndim)
    )
    whole = sum(parameter.nbytes for parameter in full.parameters())
    largest = max((parameter.nbytes for parameter in full.parameters()), default=0)
    return StreamingCost(
        cut.steps * ranked + 2 * whole + cut.bytes_after,
        cut.bytes_after,
        _PROCESS + _COPIES * largest,
    )


def calibrated_cost(cut: Cut) -> StreamingCost | None:
    """Return what pruning a model by what its channels carry takes, with refits.

    All windows of the text go through it together; there is one text for perplexities (that comes
    with the package).

    Returns:
        The cost; ``None``: what weights read is not known, for the tiny model does not run.
    """
    inputs = inputs_of(cut.field_map, cut.full)
    if inputs is None:
        return None
    steps = [[Solved(cut, each, step) for each in inputs if each.sums] for step in range(cut.steps)]
    losing = [each for each in steps[0] if each.kept < each.size]
    behind_norms = any(each.input.sums == "products" for each in losing)
    shares = [sum(each.share for each in step) for step in steps]  # weights go on to need them
    scratch = [sum(each.scratch for each in step) for step in steps]
    ranked = sum(
        cut.full.get_parameter(each.parameter).nbytes * cut.ranked(each.parameter, each.dim)
        for each in inputs
    )
    passes = 1 + 2 + cut.steps * (_PASSES_OF_STEP + behind_norms)
    whole = sum(parameter.nbytes for parameter in cut.full.parameters())
    # passes read a tied table at each of its places
    named = cut.full.named_parameters(remove_duplicate=False)
    read_in_pass = sum(parameter.nbytes for _, parameter in named)
    judged = {
        each.parameter: cut.full.get_parameter(each.parameter).nbytes  # for its errors, by products
        for each in inputs
        if len({m.get_parameter(each.parameter).shape[each.dim] for m in (cut.full, cut.after)}) > 1
    }
    read = passes * read_in_pass + cut.steps * (ranked + sum(judged.values()))
    read += 2 * whole + cut.bytes_after
    solving = max((each.memory for each in losing), default=0)
    return StreamingCost(
        read,
        cut.bytes_after,
        _PROCESS + max(_memory_of_pass(cut.full, steps[0]), solving),
        max(sum(pair) for pair in zip(scratch, accumulate(shares), strict=True)),
    )


class Solved:
    """What the refit of one input takes in one step, in bytes.

    Attributes:
        input: the input.
        size: the number of its channels.
        kept: how many stay.
        sums: the Gram matrix, or products with what stays; behind norms, only of what loses.
        share: the refits.
        memory: what solving holds.
        scratch: the sums that are in temporary files.
    """

    def __init__(self, cut: Cut, each: Input, step: int):
        self.input = each
        before, after = (
            int(model.get_parameter(each.parameter).shape[each.dim])
            for model in (cut.full, cut.after)
        )
        self.size, self.kept = (
            before - (before - after) * number // cut.steps for number in (step, step + 1)
        )
        loses, plain = self.kept < self.size, each.sums == "gram"
        targets = self.size - self.kept if plain else self.size
        self.sums = 4 * (self.size**2 if plain else self.kept * (self.kept + self.size) * loses)
        self.share = 4 * each.parts * self.kept * targets if loses else 0
        self.memory = self.sums + 24 * self.kept * (self.kept + targets)  # three copies, float64
        errors = 8 * targets**2 * loses  # products of them, by the cut and with the refit
        sums = self.sums + errors if plain else max(self.sums, errors)
        self.scratch = each.parts * sums


def _memory_of_pass(full: nn.Module, solved: Iterable[Solved]) -> int:
    """Return the most that passes hold: weights and sums of a layer, hidden states, activations."""
    stages = stages_of(full, sum(parameter.nbytes for parameter in full.parameters()))
    stages_with: dict[int, list[nn.Module]] = {}
    for stage in dict.fromkeys(stages):
        for parameter in stage.parameters():
            stages_with.setdefault(id(parameter), []).append(stage)
    outside = [each for each in full.parameters() if id(each) not in stages_with and each.ndim > 1]
    largest = max(outside, key=lambda each: each.nbytes, default=torch.empty(0, 0))
    sums = dict.fromkeys(stages, 0)
    for each in solved:
        for stage in stages_with.get(id(full.get_parameter(each.input.parameter)), ()):
            sums[stage] += each.input.parts * each.sums
    layer = max(
        (sum(each.nbytes for each in stage.parameters()) + sums[stage] for stage in stages),
        default=0,
    )
    waiting = TOKENS * min(largest.shape) * largest.element_size()
    widest = max(max(each.shape, default=1) for each in full.parameters())
    return max(layer, largest.nbytes) + waiting + _ACTIVATIONS * WINDOW * widest
