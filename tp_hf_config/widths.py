"""Which fields and layers of a live model can be pruned through Torch-Pruning's traced graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any

from torch import nn

from .choice import closest
from .errors import UnsupportedModelError
from .heads import heads_of
from .learn import ConfigMap
from .limits import multiple_of
from .reference import FieldPath, field_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Conv = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class WidthView:
    """One live model seen through the map of its class."""

    model: PreTrainedModel
    known: ConfigMap

    def producers(self) -> Iterable[tuple[str, nn.Module, frozenset[FieldPath]]]:
        """Layers whose output width some field sets, and those fields."""
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (nn.Linear, _Conv, nn.Embedding)):
                dim = 1 if isinstance(module, nn.Embedding) else 0
                dim = 1 if getattr(module, "transposed", False) else dim
                if weight is not None:
                    yield name, module, self.known.fields_of(f"{name}.weight", dim)

    def head_layers(
        self, values: Mapping[FieldPath, int] | None = None
    ) -> Iterable[tuple[str, nn.Module, int]]:
        """Layers whose output is split into heads, and how many heads the config says they have.

        ``values``: of the config now; by default those that were learned.
        """
        values = values or self.known.values
        for name, module in self.model.named_modules():
            splits = self.known.splits_of(name)
            if splits is not None and isinstance(module, nn.Linear):
                # Falcon's one key/value head stands among the query heads of its projection
                fields = self.known.fields_of(name, heads_of(0))
                if len(fields) > 1:  # a number that is 1 counts no heads to prune
                    fields = frozenset(path for path in fields if self.known.values[path] > 1)
                yield name, module, values[min(fields)] if len(fields) == 1 else splits[0][0]

    def plain_heads(self, name: str) -> bool:
        """Whether a layer's output is one (heads, head dim) block, as many as its neighbours'."""
        parent = self.known.depth.canonical(name).rpartition(".")[0]
        around = {
            splits
            for other, splits in self.known.layout.heads.items()
            if other.rpartition(".")[0] == parent
        }
        return len(around) == 1 and all(
            len(splits) == 1 and len(splits[0]) == 2 for splits in around
        )

    def widths(self) -> frozenset[FieldPath]:
        """The fields that set an output width inside the model and nothing else."""
        known = self.known
        inner: set[FieldPath] = set()
        barred: set[FieldPath] = set()
        for name, module in self.model.named_modules():
            fields = known.fields_of(f"{name}.weight", 0)
            if isinstance(module, nn.Embedding):
                barred |= fields  # a number of entries: vocabulary, positions
            elif isinstance(module, (nn.Linear, _Conv)):
                canonical = known.depth.canonical(name)
                if canonical not in known.layout.outputs:
                    inner |= fields
        for name, parameter in self.model.named_parameters():
            sized = [dim for dim, size in enumerate(parameter.shape) if size > 1]
            for dim in sized if len(sized) > 2 else ():
                conv = isinstance(self.model.get_submodule(name.rpartition(".")[0]), _Conv)
                if dim > 1 or not conv:  # kernels, and 3-D experts, which tracing mangles
                    barred |= known.fields_of(name, dim)
        inner |= {known.linked[path] for path in inner & known.linked.keys()}
        return frozenset(inner - barred)

    def inner_widths(self) -> frozenset[FieldPath]:
        """The widths inside the model that are pruned unless others are asked for.

        Not the number or size of heads, not the number of experts, not what only outputs have.
        """
        known = self.known
        inner: set[FieldPath] = set()
        barred = set(self.head_fields())
        for name, parameter in self.model.named_parameters():
            module_name = name.rpartition(".")[0]
            module = self.model.get_submodule(module_name)
            for dim in range(parameter.ndim):
                fields = known.fields_of(name, dim)
                if isinstance(module, nn.Embedding) and dim == 0:
                    barred |= fields  # a number of entries
                elif parameter.ndim > 2 and dim == 0 and not isinstance(module, _Conv):
                    barred |= fields if parameter.shape[0] > 1 else set()  # a number of experts
                elif isinstance(module, _Conv) and dim > 1:
                    barred |= fields  # a kernel's size
                elif known.depth.canonical(module_name) in known.layout.outputs:
                    continue
                elif dim != 1 or not isinstance(module, (nn.Linear, _Conv)):
                    inner |= fields
        return frozenset(inner - barred)

    def layers_of(self, name: str) -> list[nn.Module]:
        """The layers whose output width one field sets."""
        return [
            module
            for _, module, fields in self.producers()
            if name in {field_name(path) for path in fields}
        ]

    def head_fields(self) -> frozenset[FieldPath]:
        """The fields that set how many heads there are, or how wide one is."""
        counts = self.known.count_fields()
        dims = {
            path
            for name, _, fields in self.producers()
            if self.known.splits_of(name)
            for path in fields
            if fields & counts
        }
        return frozenset(counts | dims)

    def unequal(self) -> frozenset[FieldPath]:
        """The fields of layers that are cut into unequal pieces; tracing mistakes them."""
        found: set[FieldPath] = set()
        for name, _, fields in self.producers():
            sizes = self.known.layout.pieces.get(self.known.depth.canonical(name), ())
            if len(set(sizes)) > 1:
                found |= fields
        return frozenset(found)

    def select(self, prune: Iterable[str] | None, prune_num_heads: bool) -> frozenset[FieldPath]:
        """The fields to prune."""
        widths = self.widths()
        heads = self.head_fields()
        default = widths - heads - self.unequal()
        if prune_num_heads and any(self.plain_heads(name) for name, _, _ in self.head_layers()):
            self._check_heads()
            # what has to stay a multiple of the heads cannot move while they do
            tied = {path for path in default if multiple_of(self.known, path) > 1}
            default -= tied - self.coupled(default)
        offered = default | (heads if prune_num_heads else frozenset())
        if prune is None:
            return offered
        names = {field_name(path): path for path in widths | heads}
        wanted = list(prune)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise UnsupportedModelError(
                f"prune={wanted}: {', '.join(unknown)} sets no width of "
                f"{type(self.model).__name__} that tracing can prune. Fields that do: "
                f"{', '.join(sorted(field_name(path) for path in offered))}"
                f"{closest(unknown[0], names)}."
            )
        selected = frozenset(names[name] for name in wanted)
        if prune_num_heads and selected & heads:
            selected |= heads  # query, key and value heads go together
            silent = {path for path in heads if not self.known.moves_shapes(path)}
            if silent and not self.coupled(selected):
                raise UnsupportedModelError(
                    f"prune={wanted}: {type(self.model.config).__name__} makes the head size from "
                    f"the hidden size and {field_name(min(silent))}, so heads can only go together "
                    f"with the hidden size. Add it to prune=, with head_pruning_ratio equal to "
                    "pruning_ratio."
                )
        return selected

    def _check_heads(self) -> None:
        """Heads that something besides projections is as wide as are beyond tracing."""
        heads = self.head_fields()
        for name, parameter in self.model.named_parameters():
            module = self.model.get_submodule(name.rpartition(".")[0])
            for dim in range(parameter.ndim):
                fields = self.known.fields_of(name, dim) & heads
                if fields and not isinstance(module, nn.Linear):
                    raise UnsupportedModelError(
                        f"{type(self.model).__name__}: {name} has a dimension per head "
                        f"({field_name(min(fields))}), which Torch-Pruning's trace does not see: "
                        "it would prune the projections alone. Leave prune_num_heads out."
                    )

    def coupled(self, selected: frozenset[FieldPath]) -> frozenset[FieldPath]:
        """Selected fields that also set the width of projections split into heads (BERT)."""
        heads = self.head_fields()
        return frozenset(
            path
            for name, _, fields in self.producers()
            if self.known.splits_of(name)
            for path in fields & selected
            if path not in heads
        )

    def rotates_head_dims(self) -> bool:
        """Whether some unsaved buffer is as wide as a head, or half one: position tables."""
        dims = {split[-1] for splits in self.known.layout.heads.values() for split in splits}
        return any(
            buffer is not None and buffer.ndim and {buffer.shape[-1], 2 * buffer.shape[-1]} & dims
            for module in self.model.modules()
            for key, buffer in module._buffers.items()
            if key in module._non_persistent_buffers_set
        )

    def fused(self, selected: frozenset[FieldPath]) -> dict[nn.Module, int]:
        """Layers whose output is cut into equal pieces (gate and up in one), and how many."""
        result: dict[nn.Module, int] = {}
        for name, module, fields in self.producers():
            sizes = self.known.layout.pieces.get(self.known.depth.canonical(name), ())
            if len(sizes) > 1 and len(set(sizes)) == 1 and fields & selected:
                result[module] = len(sizes)
        return result

    def ignored(self, selected: frozenset[FieldPath], heads: set[nn.Module]) -> list[nn.Module]:
        """Layers whose output width has to stay."""
        split = {module for _, module, _ in self.head_layers()}
        return [
            module
            for _, module, fields in self.producers()
            if not fields & selected or (module in split and module not in heads)
        ]

    def bare_parameters(self, selected: frozenset[FieldPath]) -> list[tuple[nn.Parameter, int]]:
        """Parameters whose selected dimension is not the last that is longer than one."""
        result: list[tuple[nn.Parameter, int]] = []
        for module_name, module in self.model.named_modules():
            if type(module).__module__.startswith("torch.nn"):
                continue
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{module_name}.{key}" if module_name else key
                dims = [
                    dim
                    for dim in range(parameter.ndim)
                    if self.known.fields_of(name, dim) & selected
                ]
                last = max((d for d, size in enumerate(parameter.shape) if size > 1), default=-1)
                if dims and dims[-1] != last:
                    result.append((parameter, dims[-1]))
        return result

    def rounding(
        self,
        selected: frozenset[FieldPath],
        coupled: frozenset[FieldPath],
        round_to: int | None,
        prune_num_heads: bool,
    ) -> dict[str, Any]:
        """How to round, so that the class accepts the widths after every step."""
        if coupled:
            width = min(self.known.values[path] for path in coupled)
            _, _, count = next(iter(self.head_layers()))
            grid = width // count if prune_num_heads else count
            return {
                "round_to": round_to,
                "iterative_pruning_ratio_scheduler": SnappedSchedule(
                    width, lcm(grid, round_to or 1)
                ),
            }
        heads = self.head_fields()
        steps = [multiple_of(self.known, path) for path in selected - heads]
        step = lcm(round_to or 1, *steps)
        return {"round_to": step if step > 1 else None}


@dataclass(frozen=True)
class SnappedSchedule:
    """A linear schedule whose every ratio leaves a multiple of ``grid`` out of ``width``.

    Torch-Pruning's ``round_to`` counts the channels of one head against those of all
    (base_pruner.py, ``_round_to``), so where the hidden size and the head size shrink together the
    ratios are made exact instead.
    """

    width: int
    grid: int

    def __call__(self, pruning_ratio: float, steps: int) -> list[float]:
        """Ratios for steps 0 to ``steps``, as Torch-Pruning's schedulers give them."""
        return [self.snap(pruning_ratio * step / steps) for step in range(steps + 1)]

    def snap(self, ratio: float) -> float:
        """The next larger ratio that leaves a multiple of ``grid``."""
        if ratio <= 0:
            return 0.0
        kept = max(self.grid, int(self.width * (1 - ratio) + 1e-6) // self.grid * self.grid)
        return 1 - (kept + 1e-6) / self.width
