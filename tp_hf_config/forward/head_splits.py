"""See how outputs of layers are split into heads, from a forward pass on the meta device.

The head count of a BERT layer is in no tensor's shape, but in what the forward pass does with a
projection's output: ``view(batch, tokens, heads, head_dim)``. A run on the meta device shows it for
every class, takes milliseconds and needs no layer names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UnsupportedModelError
from ..model.meta_run import NoValues, RealNumbers
from ..model.surroundings import note_shortage
from .inputs import example_inputs, text_inputs
from .run_recipe import PLAIN, RunRecipe

_SPLITS = (torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.unflatten)
_CHUNKS = (torch.Tensor.chunk, torch.chunk, torch.Tensor.split, torch.split)
_TAKES = (torch.Tensor.unbind, torch.unbind, torch.Tensor.select, torch.select)
_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)
_POOLS = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2}  # -> number of axes of positions
_OVER_POSITIONS = frozenset({*_SOFTMAX, F.scaled_dot_product_attention, *_POOLS})


@dataclass(frozen=True)
class HeadSplits:
    """How the forward pass cuts and splits the outputs of layers."""

    # layer -> split of each piece: ((heads, head_dim),), three for fused q/k/v, or ((heads, parts,
    # head_dim),) if q/k/v are fused per head
    heads: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    # layer -> sizes of the pieces of its output features (fused gate and up, fused q/k/v)
    pieces: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()  # layers whose output the model returns (lm_head)
    steps: int = 0  # calls of projections; fewer if the forward pass stopped early
    ended: bool = False  # the forward pass completed with all inputs, not with text alone
    numbers: int = 0  # in the results of all operations: the cost of the pass
    idle: frozenset[str] = frozenset()  # projections that were not called
    # softmaxes over a single entry (attention over one token), and pools that made several
    # positions of one: all entries are alike then
    alone: int = 0


def observe(model: nn.Module, recipe: RunRecipe = PLAIN, text_alone: bool = True) -> HeadSplits:
    """Run a model on the meta device; return how the outputs of its projections are split.

    A forward pass that needs values stops early; the result has the layers up to there. If images
    or sound stop it, ``text_alone`` adds the layers of a second run on text alone.
    """
    text_alone = text_alone and recipe.make_inputs is None
    try:
        with torch.no_grad(), RealNumbers():
            text = text_inputs(model) if text_alone else None
            inputs = example_inputs(model, recipe)
    except UnsupportedModelError:  # make_inputs= rejects this config
        return HeadSplits()
    splits = splits_with(model, inputs)
    if splits.ended or text is None:
        return splits
    of_text = splits_with(model, text)
    return HeadSplits(
        splits.heads | of_text.heads,
        splits.pieces | of_text.pieces,
        splits.outputs | of_text.outputs,
        splits.steps + of_text.steps,
        splits.ended,
        splits.numbers + of_text.numbers,
        splits.idle & of_text.idle,
        splits.alone + of_text.alone,
    )


def splits_with(model: nn.Module, inputs: Mapping[str, Any]) -> HeadSplits:
    """Run a model on these inputs; return its head splits, even if the pass stops early."""
    ended = False
    watch = _SplitWatch()
    run = RealNumbers()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor) and weight.ndim == 2
    }
    try:
        with ExitStack() as stack, torch.no_grad(), run, watch:
            for name, module in layers.items():
                stack.enter_context(module.register_forward_hook(watch.hook(name)))
            watch.returned(model(**inputs))
            ended = True
    except Exception as error:
        note_shortage(error)  # else the pass needs values, and stops here
    return HeadSplits(
        heads=watch.complete_heads(),
        pieces={name: tuple(sizes) for name, sizes in watch.pieces.items()},
        outputs=frozenset(watch.outputs),
        steps=watch.steps,
        ended=ended,
        numbers=run.numbers,
        idle=frozenset(layers.keys() - watch.called),
        alone=watch.alone,
    )


def feature_split(shape: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...] | None:
    """Trailing dims of ``shape`` that split the last dim of ``before`` in a view, or ``None``."""
    for start in range(len(shape) - 1, -1, -1):
        if math.prod(shape[start:]) == before[-1]:
            tail = shape[start:]
            while len(tail) > 1 and tail[0] == 1 and len(shape) - start > 2:
                start, tail = start + 1, tail[1:]
            return tail if len(tail) > 1 else None
    return None


def _by_piece(split: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return one split, or three if it is ``(3, heads, head_dim)`` (ModernBERT's ``Wqkv``)."""
    # (heads, 3, head_dim) differs: q, k and v of one head, then of the next
    if len(split) == 3 and split[0] == 3 and split[1] != 3:
        return (split[1:],) * 3
    return (split,)


def _is_over_one(func: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> bool:
    """True if a softmax is over a single entry, or a pool makes several positions of one."""
    first: Any = args[0] if args else kwargs.get("input")
    if func in _SOFTMAX:
        return bool(first.shape[kwargs.get("dim", args[1] if len(args) > 1 else -1)] == 1)
    if func is F.scaled_dot_product_attention:
        return bool((args[1] if len(args) > 1 else kwargs["key"]).shape[-2] == 1)
    axes = _POOLS[func]
    return bool(first.shape[-axes:].numel() == 1 < output.shape[-axes:].numel())


def _takes_apart(func: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> bool:
    """True if the last axis is taken apart: it holds pairs (gate and up of a unit), not heads."""
    tensor = args[0]
    if func in _TAKES:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return dim in (-1, tensor.ndim - 1)
    if func in _CHUNKS:
        return all(part.shape == (*tensor.shape[:-1], 1) for part in output)
    if func is torch.Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        whole = len(index) == tensor.ndim or (len(index) > 1 and index[0] is Ellipsis)
        return whole and type(index[-1]) is int
    return False


class _SplitWatch(NoValues):
    """Follows the output of each projection until the forward pass splits it."""

    def __init__(self) -> None:
        super().__init__()
        self._splits: dict[tuple[str, int], tuple[int, ...]] = {}
        self.pieces: dict[str, list[int]] = {}
        self._per_head: set[str] = set()
        self._pairs: set[tuple[str, int]] = set()
        self.outputs: set[str] = set()
        self.steps = 0
        self.called: set[str] = set()
        self.alone = 0
        # id -> layer, piece and tensor: tensors are kept so that ids stay unique; piece -1 is the
        # whole output, -2 the output after its split into pieces
        self._source: dict[int, tuple[str, int, torch.Tensor]] = {}
        self._halves: dict[int, tuple[str, int, torch.Tensor]] = {}  # split into two axes

    def hook(self, name: str) -> Any:
        def remember(module: nn.Module, args: Any, output: Any) -> None:
            self.steps += 1
            self.called.add(name)
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, torch.Tensor):  # I-BERT's layers also return a scale
                self._source[id(first)] = (name, -1, first)

        return remember

    def complete_heads(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Layer -> splits, if its whole output or all pieces are split into heads."""
        result: dict[str, tuple[tuple[int, ...], ...]] = {}
        for name in dict.fromkeys(name for name, _ in self._splits):
            whole = self._splits.get((name, -1))
            if name in self._per_head:
                result[name] = (self._splits[(name, -1)],)
            elif whole is not None:
                result[name] = _by_piece(whole)
            elif all(complete := self._of_pieces(name)):
                result[name] = tuple(split for split in complete if split)
        return result

    def _of_pieces(self, name: str) -> list[tuple[int, ...] | None]:
        """Return how every piece of a layer's output is split; ``None``: it is not."""
        sizes = self.pieces[name]
        splits = [self._splits.get((name, piece)) for piece in range(len(sizes))]
        dims = {split[-1] for split in splits if split is not None and split[0] > 1}
        return [
            # GPT-BigCode does not split the one key and one value that it cuts off
            split or ((1, size) if {size} == dims else None)
            for split, size in zip(splits, sizes, strict=True)
        ]

    def returned(self, outputs: Any) -> None:
        """Record the projections whose output is among the model's outputs."""
        values = outputs.values() if isinstance(outputs, dict) else outputs
        for value in values if isinstance(values, (list, tuple)) else list(values):
            if id(value) in self._source:
                self.outputs.add(self._source[id(value)][0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        if func in _OVER_POSITIONS:
            self.alone += _is_over_one(func, args, kwargs or {}, output)
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        # followed tensors first: a norm's weight may precede what it scales (OLMo 2's queries)
        tensors.sort(key=lambda tensor: id(tensor) not in self._source)
        source = self._source.get(id(tensors[0])) if tensors else None
        split = self._halves.get(id(args[0])) if args else None
        if split is not None and _takes_apart(func, args, kwargs or {}, output):
            self._pairs.add(split[:2])
            self._splits.pop(split[:2], None)
        if source is not None:
            self._note(source[0], source[1], tensors, func, output)
        return output

    def _note(
        self, name: str, piece: int, tensors: list[torch.Tensor], func: Any, output: Any
    ) -> None:
        before = tensors[0]
        if func in _SPLITS:
            tail = feature_split(tuple(output.shape), tuple(before.shape))
            if piece != -1 and output.shape == (*before.shape[:-1], 1, before.shape[-1]):
                tail = (1, before.shape[-1])  # fused q/k/v with one key/value head
            if tail is not None and (name, piece) not in self._pairs:
                self._splits.setdefault((name, piece), tail)
                if len(tail) == 2:
                    self._halves[id(output)] = (name, piece, output)
                if piece == -1 and len(splits := _by_piece(tail)) > 1:
                    self.pieces.setdefault(name, [math.prod(split) for split in splits])
                    self._source[id(output)] = (name, -2, output)
        elif func in _CHUNKS:
            if piece == -1 and sum(part.shape[-1] for part in output) == before.shape[-1]:
                for part in output:
                    self._cut(name, part)
        elif not isinstance(output, torch.Tensor):
            return
        elif func is torch.Tensor.__getitem__:
            if piece == -2 and output.shape[:-2] == before.shape[:-2]:
                self._per_head.add(name)  # indexes within each of the three, so the three are heads
                self.pieces.pop(name, None)
            if (
                piece == -1
                and output.shape[:-1] == before.shape[:-1]
                and output.shape[-1] < before.shape[-1]
            ):
                self._cut(name, output)
        elif func is torch.Tensor.unsqueeze and output.shape[-1] == before.shape[-1]:
            self._source[id(output)] = (name, piece, output)
        elif output.shape == before.shape and all(
            other.numel() < before.numel() for other in tensors[1:]
        ):
            self._source[id(output)] = (name, piece, output)  # only scaled or normalised

    def _cut(self, name: str, part: torch.Tensor) -> None:
        pieces = self.pieces.setdefault(name, [])
        self._source[id(part)] = (name, len(pieces), part)
        pieces.append(part.shape[-1])


def heads_of(piece: int) -> str:
    return "heads" if piece == 0 else f"heads of piece {piece}"


def counts_of(
    splits: Sequence[tuple[int, ...]], like: Sequence[tuple[int, ...]] = ()
) -> dict[str, int]:
    """Name -> count for the counts of a layer that are quantities: the heads of each piece.

    If parts are fused per head (a key/value head's queries, key and value), the parts of all heads
    are counted too (``"parts of heads"``), since their number per head may change. ``like``: splits
    at other widths, because a split into one head may lack its axis.
    """
    counts: dict[str, int] = {}
    for piece, split in enumerate(splits):
        split = (1,) * (len(like[piece]) - len(split) if piece < len(like) else 0) + split
        counts[heads_of(piece)] = split[0]
        if len(split) > 2:
            counts[f"parts of {heads_of(piece)}"] = math.prod(split[:-1])
    return counts


def splits_after(
    splits: Sequence[tuple[int, ...]], removed: Collection[int]
) -> tuple[tuple[int, ...], ...] | None:
    """:func:`split_after` for all pieces; ``None`` also if a feature is outside of them."""
    start, result = 0, []
    for split in splits:
        end = start + math.prod(split)
        after = split_after(split, [index - start for index in removed if start <= index < end])
        if after is None:
            return None
        result.append(after)
        start = end
    return tuple(result) if all(0 <= index < start for index in removed) else None


def split_after(split: tuple[int, ...], removed: Collection[int]) -> tuple[int, ...] | None:
    """Return a split after features are removed; ``None`` if the remaining heads are uneven."""
    heads, parts, dim = split[0], math.prod(split[1:-1]), split[-1]
    lost = Counter(index // dim for index in removed)  # per part of a head
    going = [[lost[head * parts + part] for part in range(parts)] for head in range(heads)]
    staying = [counts for counts in going if counts != [dim] * parts]
    counts = {count for head in staying for count in head}
    if len(counts) != 1:
        return None
    return (len(staying), *split[1:-1], dim - counts.pop())
