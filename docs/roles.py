"""An extension of griffe: Sphinx roles in docstrings become links of this site."""

from __future__ import annotations

import re
from typing import Any

import griffe

import tp_hf_config

_ROLE = re.compile(r":\w+:`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites the roles of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """A link to what the reference has, plain code for the rest."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)


def _link(role: re.Match[str]) -> str:
    name = role[1].removeprefix("tp_hf_config.")
    public = name in tp_hf_config.__all__
    return f"[`{name}`][tp_hf_config.{name}]" if public else f"`{role[1]}`"
