"""What can be pruned in a model: per config field its proved groups, or why there are none."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .directions import units_of
from .expand import WidthGroup, expand
from .groups import Finding, find_groups
from .learn import ConfigMap, map_of
from .locate import check_followable, find_pretrained
from .miniature import Miniature, miniature
from .reference import FieldPath, Refusal, field_name, vanished_counts
from .ties import tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_experiments: weakref.WeakKeyDictionary[
    ConfigMap, tuple[Miniature | Refusal, tuple[Finding, ...]]
] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Width:
    """One config field, or several that only go together, and its groups.

    Attributes:
        fields: the fields.
        groups: the groups of coupled dimensions, proved on a tiny copy and carried over.
        units: how many units the width has; 0 where it cannot be pruned.
        layers: how many layers of the model have a part in it.
        parameters: how many parameters one unit holds in all of its groups.
        reason: why it cannot be pruned; ``None`` where it can.
        least: fewer units, and the class does not run.
        disproved: an experiment showed that its units are not interchangeable; no other way of
            finding groups would be right either.
    """

    fields: tuple[FieldPath, ...]
    groups: tuple[WidthGroup, ...] = ()
    units: int = 0
    layers: int = 0
    parameters: int = 0
    reason: str | None = None
    disproved: bool = False
    least: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The fields as people write them."""
        return tuple(field_name(path) for path in self.fields)

    @property
    def name(self) -> str:
        """The fields in one text."""
        return " + ".join(self.names)

    def to_dict(self) -> dict[str, Any]:
        """The width for ``json.dumps``."""
        return {
            "fields": list(self.names),
            "units": self.units,
            "groups": len(self.groups),
            "layers": self.layers,
            "parameters_per_unit": self.parameters,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Prunable:
    """The widths of one model; printed as a table."""

    model: str
    widths: tuple[Width, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("config field", "units", "groups", "layers", "parameters a unit", "proof")
        ]
        for width in self.widths:
            numbers = (width.units, len(width.groups), width.layers, width.parameters)
            shown = [f"{n:,}" if width.reason is None else "" for n in numbers]
            proof = width.reason or "units permuted: same outputs"
            rows.append((width.name, *shown, proof))
        sizes = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                [row[0].ljust(sizes[0]), *(row[i].rjust(sizes[i]) for i in range(1, 5)), row[5]]
            )
            for row in rows
        ]
        return "\n".join([self.model, *lines])

    def to_dict(self) -> dict[str, Any]:
        """The table for ``json.dumps``."""
        return {"model": self.model, "widths": [width.to_dict() for width in self.widths]}


def prunable(model: nn.Module) -> Prunable:
    """What can be pruned in this model through the graph made from its config.

    Experiments run on a tiny copy of the class with random weights (see
    :mod:`tp_hf_config.twins`), so the cost does not grow with the model.

    Raises:
        UnsupportedModelError: no single followable Hugging Face model.
    """
    _, pretrained = find_pretrained(model)
    check_followable(pretrained)
    return Prunable(type(pretrained).__name__, widths_of(pretrained))


def widths_of(model: PreTrainedModel) -> tuple[Width, ...]:
    """The widths of a model, from experiments that are done once per class and config."""
    known = map_of(model)
    if known not in _experiments:
        with _one_thread():
            mini = miniature(known)
            found = [] if isinstance(mini, Refusal) else find_groups(mini)
            _experiments[known] = (
                mini,
                tuple(_apart(_sayable(finding, known), found, known) for finding in found),
            )
    mini, findings = _experiments[known]
    if isinstance(mini, Refusal):
        return tuple(Width((path,), reason=mini.reason) for path in known.values)
    bound = tuple(
        Width(
            (path,),
            reason=f"{type(model.config).__name__} takes no other value of it alone, only with "
            + " or ".join(field_name(other) for other in others),
            disproved=True,
        )
        for path, others in known.bound.items()
    )
    return tuple(_width(finding, mini, known, model) for finding in findings) + bound


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tiny tensors: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _width(finding: Finding, mini: Miniature, known: ConfigMap, model: PreTrainedModel) -> Width:
    if finding.reason is not None:
        return Width(finding.fields, reason=finding.reason, disproved=finding.disproved)
    groups = expand(finding, mini, known, model)
    if isinstance(groups, str):
        return Width(finding.fields, reason=groups)
    if not groups:
        return Width(finding.fields, reason="the real model has no such group")
    return Width(
        fields=finding.fields,
        groups=tuple(groups),
        units=groups[0].units // groups[0].grain,
        layers=len({m.name.rpartition(".")[0] for group in groups for m in group.members}),
        parameters=_parameters_per_unit(groups, model),
        least=finding.least,
    )


def _sayable(finding: Finding, known: ConfigMap) -> Finding:
    """The finding, refused where a quarter less of the width makes some count of the class 0."""
    if finding.reason is not None:
        return finding
    units = units_of(known, finding.fields)
    less = {p: known.values[p] // units * (units - units // 4) for p in finding.fields}
    old, new = known.build_at({}), known.build_at(less)
    if isinstance(old, Refusal) or isinstance(new, Refusal):
        return finding
    vanished = vanished_counts(old, new)
    if not vanished:
        return finding
    reason = f"{vanished[0]} would be 0: a field that sets no shape would have to follow"
    return Finding(finding.fields, reason=reason, disproved=True)


def _apart(finding: Finding, others: Sequence[Finding], known: ConfigMap) -> Finding:
    """The finding, refused where a part that was not seen to run is as wide and may read it.

    Qwen2-VL's ``vision_config.hidden_size`` has to be the text's, which text alone cannot show.
    """
    unseen = [path for other in others if other.unseen for path in other.fields]
    for path in unseen:
        if finding.reason is None and any(
            known.values.get(path) == known.values.get(own) for own in finding.fields
        ):
            reason = f"{field_name(path)} is as wide, and its part of the model was not seen to run"
            return Finding(finding.fields, reason=reason)
    return finding


def _parameters_per_unit(groups: Sequence[WidthGroup], model: nn.Module) -> int:
    total = 0
    counted: set[tuple[int, int]] = set()
    for group in groups:
        for member in group.members:
            parameter = tensor(model, member.name)
            if (id(parameter), member.dim) not in counted:
                counted.add((id(parameter), member.dim))
                share = member.layout.parts * member.layout.run * group.grain
                total += parameter.numel() // parameter.shape[member.dim] * share
    return total
