"""Update config fields that repeat another one and that no code of the class reads."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..fieldmap.layer_kinds import names_in_code
from ..fieldmap.lower_depth import of_every_config
from ..model.build import Builder, Refusal
from ..model.config_json import (
    changed_values,
    config_json,
    field_name,
    plain_fields,
    value_at,
    with_values,
    without_field,
)
from .apply import difference


def with_mirrored_fields(
    builder: Builder, old: dict[str, Any], new: dict[str, Any], built: nn.Module
) -> tuple[dict[str, Any], nn.Module, list[str]]:
    """Update the fields of the new config that repeat another field, whose value has changed.

    A field repeats another one if the config's class derives it from that one when it is not given,
    and the class builds the same with it.  A field that only has the old value is noted.

    Args:
        builder: builds the class.
        old: the config's JSON before.
        new: the JSON with the widths that are proved now.
        built: the reference build of ``new``.

    Returns:
        The new JSON, its reference build, and notes for the user.
    """
    before, after = (_every_default(builder, data) for data in (old, new))
    changed = [(value_at(before, p), value) for p, value in changed_values(before, after)]
    pairs = {was: now for was, now in reversed(changed) if type(was) is type(now) is int}
    code: frozenset[str] = frozenset()
    notes: list[str] = []
    general = of_every_config()
    for field, value in plain_fields(after) if pairs else ():
        if type(value) is not int or value not in pairs or value_at(before, field) != value:
            continue
        if general & set(field):
            continue
        code = code or names_in_code(built)
        if field[-1] in code:
            continue  # probes have covered every field that is read
        without = (_every_default(builder, without_field(data, field)) for data in (old, new))
        derived = {value_at(data, field) for data in without}
        if derived == {value, pairs[value]}:
            candidate = with_values(new, {field: pairs[value]})
            candidate_build = builder.build(candidate, buffers=True)
            if not isinstance(candidate_build, Refusal):
                change = difference(built, built, candidate_build)
                if not change.attributes and not change.buffers:
                    new, built = candidate, candidate_build
                    continue
        source = next(field_name(p) for p, v in changed_values(before, after) if v == pairs[value])
        notes.append(
            f"config.{field_name(field)} is still {value}, as {source} was: no code of the class "
            f"reads it. Set it to {pairs[value]} if it means the same"
        )
    return new, built, notes


def _every_default(builder: Builder, data: dict[str, Any]) -> dict[str, Any]:
    """Return a config's JSON with every default; empty if the class refuses the config."""
    try:
        return config_json(builder.config(data), use_diff=False)
    except Exception:  # as in Builder.build
        return {}
