"""See how layers' outputs are split into heads, by running the forward pass without data.

The number of heads of a BERT layer is not in any tensor's shape.  It is in what the forward pass
does with a projection's output: ``view(batch, tokens, heads, head_dim)``.  A run on the meta device
shows it for every class, costs milliseconds and needs no layer names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .dry_run import NoValues, RealNumbers
from .inputs import example_inputs, form_of, input_forms, text_inputs
from .states import look_for_states, states_of

_SPLITS = (torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.unflatten)
_CHUNKS = (torch.Tensor.chunk, torch.chunk, torch.Tensor.split, torch.split)
_TAKES = (torch.Tensor.unbind, torch.unbind, torch.Tensor.select, torch.select)
_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


@dataclass(frozen=True)
class Layout:
    """How the forward pass takes layers' outputs apart.

    Attributes:
        heads: layer -> how each piece of its output features is split: ``((heads, head_dim),)``,
            for fused q/k/v three of them, or ``((heads, parts, head_dim),)`` where they are fused
            per head.
        pieces: layer -> sizes of the pieces its output features are cut into (fused gate and up,
            fused q/k/v).
        outputs: layers whose output is what the model returns (``lm_head``, classifiers).
        steps: how many projections were called; a forward pass that broke off has fewer.
        ended: the forward pass came to its end, with all that it takes.
        numbers: how many numbers its operations made, which is what it costs.
        idle: projections that were not called.
        alone: how often something was chosen among one: attention over a single token.
    """

    heads: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    pieces: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    steps: int = 0
    ended: bool = False
    numbers: int = 0
    idle: frozenset[str] = frozenset()
    alone: int = 0

    def joined(self, other: Layout) -> Layout:
        """What was seen here and in another run."""
        return Layout(
            {**self.heads, **other.heads},
            {**self.pieces, **other.pieces},
            self.outputs | other.outputs,
            self.steps + other.steps,
            self.ended,
            self.numbers + other.numbers,
            self.idle & other.idle,
            self.alone + other.alone,
        )


def observe(model: nn.Module) -> Layout:
    """Run ``model`` (on the meta device) and note how projections' outputs are taken apart.

    A class whose forward pass needs real values stops part of the way; what was seen until then
    is returned. Where images or sound stop it early, text alone goes another part of the way.
    Layers that read the states of an encoder outside of the model are given some.
    """
    if type(model) not in form_of:
        form_of[type(model)] = _best_form(model)
    with torch.no_grad(), RealNumbers():
        text = text_inputs(model)
        inputs = example_inputs(model)
    seen = _observe(model, inputs)
    if states_of(model) is None and look_for_states(
        model, inputs, seen.idle, lambda given: _observe(model, given).ended
    ):
        with torch.no_grad(), RealNumbers():
            inputs = example_inputs(model)
        seen = _observe(model, inputs)
    return seen if seen.ended or text is None else seen.joined(_observe(model, text))


def _best_form(model: nn.Module) -> int:
    """The form of inputs with which the forward pass goes furthest."""
    calls: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
        for module in model.modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    best, most = 0, -1
    forms = input_forms(model)
    try:
        for number in count():
            with torch.no_grad(), RealNumbers():  # not around the run: whole numbers would get lost
                inputs = next(forms, None)
            if inputs is None:
                break
            calls.clear()
            if _observe(model, inputs).ended:
                return number
            if len(calls) > most:
                best, most = number, len(calls)
    finally:
        for handle in handles:
            handle.remove()
    return best


def _observe(model: nn.Module, inputs: Mapping[str, Any]) -> Layout:
    ended = False
    watch = _Watch()
    run = RealNumbers()
    watched = {
        name: module
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor) and weight.ndim == 2
    }
    handles = [module.register_forward_hook(watch.hook(name)) for name, module in watched.items()]
    try:
        with torch.no_grad(), run, watch:
            watch.returned(model(**inputs))
            ended = True
    except Exception:
        pass  # data-dependent forward passes end here; the layers before are known
    finally:
        for handle in handles:
            handle.remove()
    return Layout(
        heads=watch.complete_heads(),
        pieces={name: tuple(sizes) for name, sizes in watch.pieces.items()},
        outputs=frozenset(watch.outputs),
        steps=watch.steps,
        ended=ended,
        numbers=run.numbers,
        idle=frozenset(watched.keys() - watch.called),
        alone=watch.alone,
    )


def feature_split(shape: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...] | None:
    """The trailing dimensions of ``shape`` that split the last dimension of ``before``."""
    for start in range(len(shape) - 1, -1, -1):
        if math.prod(shape[start:]) == before[-1]:
            tail = shape[start:]
            while len(tail) > 1 and tail[0] == 1 and len(shape) - start > 2:
                start, tail = start + 1, tail[1:]
            return tail if len(tail) > 1 else None
    return None


def _by_piece(split: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Query, key and value one after the other, each split into heads (ModernBERT's ``Wqkv``).

    ``(heads, 3, head_dim)`` is another layout: all three of one head, then of the next.
    """
    if len(split) == 3 and split[0] == 3 and split[1] != 3:
        return (split[1:],) * 3
    return (split,)


def _among(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int | None:
    """Among how many a softmax chooses; ``None``: the function is none."""
    if func in _SOFTMAX:
        values = args[0] if args else kwargs["input"]
        return int(values.shape[kwargs.get("dim", args[1] if len(args) > 1 else -1)])
    if func is F.scaled_dot_product_attention:
        return int((args[1] if len(args) > 1 else kwargs["key"]).shape[-2])
    return None


def _takes_apart(func: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> bool:
    """Whether a function takes the last axis of a tensor apart into its single entries.

    What is split so was no heads but pairs: gate and up beside each other, for each unit.
    """
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


class _Watch(NoValues):
    """Follows each projection's output until it is taken apart."""

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
        # tensors are kept, so that ids stay unique; piece -1 is the whole output, -2 its split
        self._source: dict[int, tuple[str, int, torch.Tensor]] = {}
        self._halves: dict[int, tuple[str, int, torch.Tensor]] = {}  # split in two axes

    def hook(self, name: str) -> Any:
        def remember(module: nn.Module, args: Any, output: Any) -> None:
            self.steps += 1
            self.called.add(name)
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, torch.Tensor):  # I-BERT's layers return a scale beside it
                self._source[id(first)] = (name, -1, first)

        return remember

    def complete_heads(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Layers whose whole output, or every piece of it, is split into heads."""
        result: dict[str, tuple[tuple[int, ...], ...]] = {}
        for name in dict.fromkeys(name for name, _ in self._splits):
            if name in self._per_head:
                result[name] = (self._splits[(name, -1)],)
            elif (name, -1) in self._splits:
                result[name] = _by_piece(self._splits[(name, -1)])
            else:
                result |= self._by_pieces(name)
        return result

    def _by_pieces(self, name: str) -> dict[str, tuple[tuple[int, ...], ...]]:
        """How every piece is split; one as long as a head of the others is a single head.

        GPT-BigCode's one key and value for all heads stay as they are cut.
        """
        sizes = self.pieces[name]
        seen = {piece: self._splits.get((name, piece)) for piece in range(len(sizes))}
        dims = {split[-1] for split in seen.values() if split is not None and split[0] > 1}
        found = [
            split or ((1, size) if {size} == dims else None)
            for split, size in zip(seen.values(), sizes, strict=True)
        ]
        return {name: tuple(split for split in found if split)} if all(found) else {}

    def returned(self, outputs: Any) -> None:
        """Note the projections whose output is among the model's outputs."""
        values = outputs.values() if isinstance(outputs, dict) else outputs
        for value in values if isinstance(values, (list, tuple)) else list(values):
            if id(value) in self._source:
                self.outputs.add(self._source[id(value)][0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        self.alone += _among(func, args, kwargs or {}) == 1
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        # a norm's weight stands before what it scales (OLMo 2's queries)
        tensors.sort(key=lambda tensor: id(tensor) not in self._source)
        known = self._source.get(id(tensors[0])) if tensors else None
        split = self._halves.get(id(args[0])) if args else None
        if split is not None and _takes_apart(func, args, kwargs or {}, output):
            self._pairs.add(split[:2])
            self._splits.pop(split[:2], None)
        if known is not None:
            self._note(known[0], known[1], tensors, func, output)
        return output

    def _note(
        self, name: str, piece: int, tensors: list[torch.Tensor], func: Any, output: Any
    ) -> None:
        before = tensors[0]
        if func in _SPLITS:
            tail = feature_split(tuple(output.shape), tuple(before.shape))
            if piece != -1 and output.shape == (*before.shape[:-1], 1, before.shape[-1]):
                tail = (1, before.shape[-1])  # fused query, key and value with one key/value head
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
                self._per_head.add(name)  # parts of each of the three: those are heads
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
            self._source[id(output)] = (name, piece, output)  # scaled, normalised: still it

    def _cut(self, name: str, part: torch.Tensor) -> None:
        """One more piece of a layer's output; pieces are cut in order."""
        pieces = self.pieces.setdefault(name, [])
        self._source[id(part)] = (name, len(pieces), part)
        pieces.append(part.shape[-1])


def heads_of(piece: int) -> str:
    """What a piece's number of heads is called among the observables."""
    return "heads" if piece == 0 else f"heads of piece {piece}"


def counts_of(
    splits: Sequence[tuple[int, ...]], like: Sequence[tuple[int, ...]] = ()
) -> dict[str, int]:
    """What is counted of a layer: the heads of its pieces.

    Where what is fused per head is several parts (each key/value head's queries, its key and its
    value), all parts too: how many there are in a head need not be the same for ever.

    Args:
        splits: how the pieces are split.
        like: how they are at other widths; a single head shows no dimension of its own.
    """
    found: dict[str, int] = {}
    for piece, split in enumerate(splits):
        split = (1,) * (len(like[piece]) - len(split) if piece < len(like) else 0) + split
        found[heads_of(piece)] = split[0]
        if len(split) > 2:
            found[f"parts of {heads_of(piece)}"] = math.prod(split[:-1])
    return found


def splits_after(
    splits: Sequence[tuple[int, ...]], removed: Collection[int]
) -> tuple[tuple[int, ...], ...] | None:
    """How a layer's pieces are split once some features are gone; see :func:`split_after`."""
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
    """The split of a projection's features once some of them are gone.

    Args:
        split: ``(heads, head_dim)``, or ``(heads, parts, head_dim)`` for fused layouts.
        removed: the features that were pruned.

    Returns:
        ``split`` with fewer heads where every feature of a head went, and with a smaller head dim
        where every other head lost the same number; ``None`` where heads lost different numbers,
        so that what is left cannot be told apart into equal heads.
    """
    heads, parts, dim = split[0], math.prod(split[1:-1]), split[-1]
    lost = Counter(index // dim for index in removed)  # per part of a head
    going = [[lost[head * parts + part] for part in range(parts)] for head in range(heads)]
    staying = [counts for counts in going if counts != [dim] * parts]
    counts = {count for head in staying for count in head}
    if len(counts) != 1:
        return None
    return (len(staying), *split[1:-1], dim - counts.pop())
