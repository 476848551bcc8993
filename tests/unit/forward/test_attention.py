"""A class whose eager attention computes no numbers is tried with another one."""

from __future__ import annotations

from typing import Any

import small
import torch
import transformers as hf

from tp_hf_config import supports
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.twin.tiny.tiny_model import TinyModel, tiny_model


class HiddenFromEager(hf.LlamaForCausalLM):
    """What eager attention computes is no number, as in Nemotron's streaming encoder."""

    no_numbers = ("eager",)

    def forward(self, input_ids: Any = None, use_cache: Any = None) -> Any:
        """Scores, or none."""
        output = super().forward(input_ids, use_cache=use_cache)
        if self.config._attn_implementation in self.no_numbers:
            output.logits = output.logits * torch.nan
        return output


class HiddenFromAll(HiddenFromEager):
    no_numbers = ("eager", "sdpa")


def tiny_of(model_class: Any) -> TinyModel:
    tiny = tiny_model(map_of(model_class(small.llama().config)))
    assert isinstance(tiny, TinyModel)
    return tiny


def test_the_attention_that_computes_numbers_is_taken() -> None:
    tiny = tiny_of(HiddenFromEager)
    assert tiny.recipe.attention == tiny.field_map.builder.attention == "sdpa"
    assert tiny.full_field_map.recipe.attention == tiny.full_field_map.builder.attention == "eager"
    assert tiny.model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert not tiny.model(**tiny.inputs).logits.isnan().any()


def test_where_none_does_the_class_stays_as_it_was() -> None:
    tiny = tiny_of(HiddenFromAll)
    assert tiny.recipe.attention == "eager"
    assert tiny.model.config._attn_implementation == "eager"  # type: ignore[union-attr]


def test_other_classes_are_eager() -> None:
    tiny = tiny_of(hf.LlamaForCausalLM)
    assert tiny.recipe.attention == "eager"
    assert tiny.model.config._attn_implementation == "eager"  # type: ignore[union-attr]


def test_its_widths_are_measured_with_that_attention() -> None:
    measured = supports(HiddenFromEager(small.llama().config))
    assert measured.outcome("intermediate_size") == "works"
    assert measured.outcome("num_key_value_heads") == "works"
