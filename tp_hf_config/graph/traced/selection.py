"""Select the fields and layers of a live model that Torch-Pruning's traced graph can prune."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm
from typing import Any

from torch import nn

from ...errors import UnsupportedModelError, closest
from ...fieldmap.legal_values import multiple_of
from ...fieldmap.model_view import Conv, WidthView
from ...model.config_json import FieldPath, field_name


@dataclass(frozen=True)
class TracedView(WidthView):
    """One live model seen through the field map of its class, for a graph that is traced."""

    def plain_heads(self, name: str) -> bool:
        """True if a layer's output is one (heads, head dim) block, like those of its neighbours."""
        parent = self.field_map.depth.canonical(name).rpartition(".")[0]
        around = {
            splits
            for other, splits in self.field_map.layout.heads.items()
            if other.rpartition(".")[0] == parent
        }
        return len(around) == 1 and all(
            len(splits) == 1 and len(splits[0]) == 2 for splits in around
        )

    def widths(self) -> frozenset[FieldPath]:
        """Return the fields that set an output width inside the model and nothing else."""
        field_map = self.field_map
        inner: set[FieldPath] = set()
        barred: set[FieldPath] = set()
        for name, module in self.model.named_modules():
            fields = field_map.fields_of(f"{name}.weight", 0)
            if isinstance(module, nn.Embedding):
                barred |= fields  # a number of entries: vocabulary, positions
            elif isinstance(module, (nn.Linear, Conv)):
                canonical = field_map.depth.canonical(name)
                if canonical not in field_map.layout.outputs:
                    inner |= fields
        for name, parameter in self.model.named_parameters():
            sized = [dim for dim, size in enumerate(parameter.shape) if size > 1]
            for dim in sized if len(sized) > 2 else ():
                conv = isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv)
                if dim > 1 or not conv:  # kernels, and 3-D experts, which tracing mangles
                    barred |= field_map.fields_of(name, dim)
        inner |= {field_map.linked[field] for field in inner & field_map.linked.keys()}
        return frozenset(inner - barred)

    def layers_of(self, name: str) -> list[nn.Module]:
        """Return the layers whose output width the field of this name sets."""
        return [
            module
            for _, module, fields in self.producers()
            if name in {field_name(field) for field in fields}
        ]

    def unequal(self) -> frozenset[FieldPath]:
        """Return the fields of layers cut into unequal pieces, which tracing mistakes."""
        unequal_fields: set[FieldPath] = set()
        for name, _, fields in self.producers():
            sizes = self.field_map.layout.pieces.get(self.field_map.depth.canonical(name), ())
            if len(set(sizes)) > 1:
                unequal_fields |= fields
        return frozenset(unequal_fields)

    def select(self, prune: Iterable[str] | None, prune_num_heads: bool) -> frozenset[FieldPath]:
        """Return the fields to prune.

        Args:
            prune: names of fields; ``None``: all that tracing can prune by default.
            prune_num_heads: True if heads are pruned too.

        Raises:
            UnsupportedModelError: a name sets no width that can be pruned, or heads cannot be.
        """
        widths = self.widths()
        heads = self.head_fields()
        default = widths - heads - self.unequal()
        if prune_num_heads and any(self.plain_heads(name) for name, _, _ in self.head_layers()):
            self._check_heads()
            # a field that has to stay a multiple of the heads cannot change while they do
            tied = {field for field in default if multiple_of(self.field_map, field) > 1}
            default -= tied - self.coupled(default)
        offered = default | (heads if prune_num_heads else frozenset())
        if prune is None:
            return offered
        names = {field_name(field): field for field in widths | heads}
        wanted = list(prune)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise UnsupportedModelError(
                f"prune={wanted}: {', '.join(unknown)} sets no width of "
                f"{type(self.model).__name__} that tracing can prune. Fields that do: "
                f"{', '.join(sorted(field_name(field) for field in offered))}"
                f"{closest(unknown[0], names)}."
            )
        selected = frozenset(names[name] for name in wanted)
        if prune_num_heads and selected & heads:
            selected |= heads  # query, key and value heads go together
            silent = {field for field in heads if not self.field_map.moves_shapes(field)}
            if silent and not self.coupled(selected):
                raise UnsupportedModelError(
                    f"prune={wanted}: {type(self.model.config).__name__} makes the head size from "
                    f"the hidden size and {field_name(min(silent))}, so heads can only go together "
                    f"with the hidden size. Add it to prune=, with head_pruning_ratio equal to "
                    "pruning_ratio."
                )
        return selected

    def _check_heads(self) -> None:
        """Raise if anything but projections is as wide as the heads; tracing does not see it."""
        heads = self.head_fields()
        for name, parameter in self.model.named_parameters():
            module = self.model.get_submodule(name.rpartition(".")[0])
            for dim in range(parameter.ndim):
                fields = self.field_map.fields_of(name, dim) & heads
                if fields and not isinstance(module, nn.Linear):
                    raise UnsupportedModelError(
                        f"{type(self.model).__name__}: {name} has a dimension per head "
                        f"({field_name(min(fields))}), which Torch-Pruning's trace does not see: "
                        "it would prune the projections alone. Leave prune_num_heads out."
                    )

    def coupled(self, selected: frozenset[FieldPath]) -> frozenset[FieldPath]:
        """Return selected fields that also set the width of projections split into heads (BERT)."""
        heads = self.head_fields()
        return frozenset(
            field
            for name, _, fields in self.producers()
            if self.field_map.splits_of(name)
            for field in fields & selected
            if field not in heads
        )

    def fused(self, selected: frozenset[FieldPath]) -> dict[nn.Module, int]:
        """Return layer -> number of equal pieces its output is cut into (fused gate and up)."""
        result: dict[nn.Module, int] = {}
        for name, module, fields in self.producers():
            sizes = self.field_map.layout.pieces.get(self.field_map.depth.canonical(name), ())
            if len(sizes) > 1 and len(set(sizes)) == 1 and fields & selected:
                result[module] = len(sizes)
        return result

    def ignored(self, selected: frozenset[FieldPath], heads: set[nn.Module]) -> list[nn.Module]:
        """Return the layers whose output width has to stay.

        Args:
            selected: the fields to prune.
            heads: layers whose heads, or head dims, are pruned.
        """
        split = {module for _, module, _ in self.head_layers()}
        return [
            module
            for _, module, fields in self.producers()
            if not fields & selected or (module in split and module not in heads)
        ]

    def bare_parameters(self, selected: frozenset[FieldPath]) -> list[tuple[nn.Parameter, int]]:
        """Return bare parameters with the dimension to cut, where tracing would cut another one.

        Its default is the last dimension that is longer than one.
        """
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
                    if self.field_map.fields_of(name, dim) & selected
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
        """Return the pruner arguments with which the class accepts the widths after every step.

        Args:
            selected: the fields to prune.
            coupled: those of them that :meth:`coupled` returns.
            round_to: the number of channels to round to, if the user gave one.
            prune_num_heads: True if heads are pruned too.
        """
        if coupled:
            width = min(self.field_map.values[field] for field in coupled)
            _, _, count = next(iter(self.head_layers()))
            grid = width // count if prune_num_heads else count
            return {
                "round_to": round_to,
                "iterative_pruning_ratio_scheduler": SnappedSchedule(
                    width, lcm(grid, round_to or 1)
                ),
            }
        heads = self.head_fields()
        steps = [multiple_of(self.field_map, field) for field in selected - heads]
        step = lcm(round_to or 1, *steps)
        return {"round_to": step if step > 1 else None}


@dataclass(frozen=True)
class SnappedSchedule:
    """A linear schedule whose every ratio leaves a multiple of ``grid`` out of ``width``.

    Torch-Pruning's ``round_to`` counts the channels of one head against those of all
    (base_pruner.py, ``_round_to``), so if the hidden size and the head size shrink together, the
    ratios are made exact instead.
    """

    width: int
    grid: int

    def __call__(self, pruning_ratio: float, steps: int) -> list[float]:
        """Return the ratios of steps 0 to ``steps``, as Torch-Pruning's schedulers do."""
        return [self.snap(pruning_ratio * step / steps) for step in range(steps + 1)]

    def snap(self, ratio: float) -> float:
        """Return the smallest ratio >= ``ratio`` that leaves a positive multiple of ``grid``."""
        if ratio <= 0:
            return 0.0
        kept = max(self.grid, int(self.width * (1 - ratio) + 1e-6) // self.grid * self.grid)
        return 1 - (kept + 1e-6) / self.width
