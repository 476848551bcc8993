"""Make the plan of a model that is not loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import PipelineError
from ..planning.make_plan import plan
from ..planning.plan import Plan
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def planned(
    source: Source,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    settings: Mapping[str, Any],
) -> Plan:
    """Return the plan that :func:`~tp_hf_config.plan` makes from the config alone.

    Args:
        source: the model, for messages.
        config: its config.
        model_class: its class.
        settings: keyword arguments for :func:`~tp_hf_config.plan`.

    Raises:
        PipelineError: a setting is invalid or the target cannot be reached.
        UnsupportedModelError: a field cannot be pruned.
    """
    try:
        return plan(config, model_class=model_class, **settings)
    except ValueError as error:
        raise PipelineError(f"{source.name}: {error}") from error
