"""What a process remembers of classes, emptied: as in a new process, without starting one."""

from __future__ import annotations

import weakref
from collections import OrderedDict

import pytest

from tp_hf_config.fieldmap import learn_field_map, model_view
from tp_hf_config.twin.tiny import tiny_model


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process a new one, as far as classes are concerned, until the test ends."""
    monkeypatch.setattr(learn_field_map, "_learned", OrderedDict())
    monkeypatch.setattr(model_view, "_cached_views", weakref.WeakKeyDictionary())
    monkeypatch.setattr(tiny_model, "_built", OrderedDict())
