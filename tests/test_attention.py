"""A class whose eager attention computes no numbers is tried with another one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import small
import torch
import transformers as hf

from tp_hf_config import supports
from tp_hf_config.learn import map_of
from tp_hf_config.miniature import Miniature, miniature
from tp_hf_config.reference import attention_of


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


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    before = dict(attention_of)
    attention_of.clear()
    yield
    attention_of.clear()
    attention_of.update(before)


def tiny(model_class: Any) -> Miniature:
    mini = miniature(map_of(model_class(small.llama().config)))
    assert isinstance(mini, Miniature)
    return mini


def test_the_attention_that_computes_numbers_is_taken() -> None:
    mini = tiny(HiddenFromEager)
    assert attention_of == {HiddenFromEager: "sdpa"}
    assert mini.model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert not mini.model(**mini.inputs).logits.isnan().any()


def test_where_none_does_the_class_stays_as_it_was() -> None:
    mini = tiny(HiddenFromAll)
    assert attention_of == {}
    assert mini.model.config._attn_implementation == "eager"  # type: ignore[union-attr]


def test_other_classes_are_eager() -> None:
    mini = tiny(hf.LlamaForCausalLM)
    assert attention_of == {}
    assert mini.model.config._attn_implementation == "eager"  # type: ignore[union-attr]


def test_its_widths_are_measured_with_that_attention() -> None:
    measured = supports(HiddenFromEager(small.llama().config))
    assert measured.outcome("intermediate_size") == "works"
    assert measured.outcome("num_key_value_heads") == "works"
