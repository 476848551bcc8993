"""Find head counts and head sizes that shapes do not tell."""

from __future__ import annotations

from ..fieldmap.expressions import Expression, Power, Quantity
from ..fieldmap.field_map import FieldMap
from ..fieldmap.solve.fit import Problem, open_together
from ..fieldmap.solve.recover import hidden_counts
from ..model.config_json import field_name


def undecided_heads(field_map: FieldMap) -> dict[str, int]:
    """Return the head counts that no shape shows, and fields that shapes show only together.

    Heads times head dim is one number: four heads of 16 and two of 32 have the same shapes.

    Returns:
        The fields' names, with the values that the config says or implies.
    """
    quantities: dict[Quantity, Expression | Power] = {**field_map.powers, **field_map.expressions}
    shown = {key: made for key, made in quantities.items() if isinstance(key[1], int)}
    sizes = {key: made.base for key, made in shown.items()}
    together = open_together(Problem(shown, field_map.sizes, sizes))
    fields = {*hidden_counts(field_map), *together}
    return {field_name(f): field_map.sizes[f] for f in sorted(fields, key=field_name)}
