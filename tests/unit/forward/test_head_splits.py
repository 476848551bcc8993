"""How projections are split into heads, seen in the forward pass and followed through prunes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tp_hf_config.forward.find_recipe import find_recipe
from tp_hf_config.forward.head_splits import (
    feature_split,
    heads_of,
    observe,
    split_after,
    splits_after,
)

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)
plain = st.tuples(st.integers(2, 6), st.integers(2, 6))
fused = st.tuples(st.integers(2, 5), st.integers(2, 3), st.integers(2, 6))
splits = plain | fused


def grid(split: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(split)).view(split)


@st.composite
def legal(draw: Any) -> tuple[tuple[int, ...], list[int], tuple[int, ...]]:
    """A split, channels whose removal leaves equal heads, and the split that is left."""
    split = draw(splits)
    heads, dims = split[0], split[-1]
    gone = draw(st.sets(st.integers(0, heads - 1), max_size=heads - 1))
    lost = draw(st.integers(0, dims - 1))
    cells = grid(split)
    removed: list[int] = []
    for head in range(heads):
        if head in gone:
            removed += cells[head].flatten().tolist()
        else:
            for row in cells[head].reshape(-1, dims):  # each head, and part, loses its own dims
                chosen = draw(st.permutations(range(dims)))[:lost]
                removed += row[torch.tensor(chosen, dtype=torch.long)].tolist()
    return split, draw(st.permutations(removed)), (heads - len(gone), *split[1:-1], dims - lost)


@EXAMPLES
@given(legal())
def test_whole_heads_and_equal_dims(drawn: Any):
    split, removed, after = drawn
    assert split_after(split, removed) == after


@EXAMPLES
@given(legal(), st.data())
def test_one_more_channel_is_no_longer_equal(drawn: Any, data: Any):
    split, removed, after = drawn
    if after[0] < 2 or after[-1] < 2:  # then it can be a whole head, or all there is
        return
    left = sorted(set(range(math.prod(split))) - set(removed))
    assert split_after(split, [*removed, data.draw(st.sampled_from(left))]) is None


@EXAMPLES
@given(splits)
def test_nothing_removed_and_everything_removed(split: tuple[int, ...]):
    assert split_after(split, []) == split
    assert split_after(split, range(math.prod(split))) is None


@EXAMPLES
@given(legal(), legal())
def test_two_prunes_in_a_row(first: Any, second: Any):
    split, removed, after = first
    remaining = [i for i in range(math.prod(split)) if i not in set(removed)]
    again = [i for i in range(math.prod(after)) if i % after[-1] == 0]
    if after[-1] < 2:
        return
    both = [*removed, *(remaining[i] for i in again)]
    assert split_after(after, again) == split_after(split, both)
    assert split_after(after, again) == (*after[:-1], after[-1] - 1)


def test_parts_of_a_head_have_to_lose_the_same():
    # (2 heads, 2 parts, 2 dims): each head loses both dims of its first part. What is left is one
    # part of two dims, which is not two parts of one dim
    assert split_after((2, 2, 2), [0, 1, 4, 5]) is None
    assert split_after((2, 2, 2), [0, 2, 4, 6]) == (2, 2, 1)


@EXAMPLES
@given(st.lists(legal(), min_size=1, max_size=3))
def test_every_piece_on_its_own(pieces: Any):
    removed, start = [], 0
    for split, gone, _ in pieces:
        removed += [start + index for index in gone]
        start += math.prod(split)
    expected = tuple(after for _, _, after in pieces)
    assert splits_after([split for split, _, _ in pieces], removed) == expected
    assert splits_after([split for split, _, _ in pieces], [*removed, start]) is None
    assert splits_after([split for split, _, _ in pieces], [*removed, -1]) is None


def test_one_piece_that_cannot_be_told_apart_spoils_all():
    assert splits_after([(2, 2), (2, 2)], [4, 5]) == ((2, 2), (1, 2))
    assert splits_after([(2, 2), (2, 2)], [4]) is None


@pytest.mark.parametrize(
    ("shape", "before", "expected"),
    [
        ((2, 8, 4, 16), (2, 8, 64), (4, 16)),
        ((1, 8, 4, 16), (1, 8, 64), (4, 16)),
        ((2, 8, 4, 3, 16), (2, 8, 192), (4, 3, 16)),
        ((16, 64), (2, 8, 64), None),
        ((2, 8, 64), (2, 8, 64), None),
        ((2, 512), (2, 8, 64), None),
        ((16, 4, 16), (16, 64), (4, 16)),
    ],
)
def test_feature_split(shape: Any, before: Any, expected: Any):
    assert feature_split(shape, before) == expected


def test_names_of_head_counts():
    assert [heads_of(piece) for piece in range(3)] == [
        "heads",
        "heads of piece 1",
        "heads of piece 2",
    ]


def meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls(config).eval()


def test_observe_bert():
    layout = observe(small.bert(hidden_size=24, num_attention_heads=3).to("meta"))
    assert layout.heads == {
        f"encoder.layer.{layer}.attention.self.{name}": ((3, 8),)
        for layer in range(2)
        for name in ("query", "key", "value")
    }
    assert layout.pieces == {}


def test_observe_grouped_queries_and_the_output_layer():
    layout = observe(small.llama(num_key_value_heads=2).to("meta"))
    attention = "model.layers.1.self_attn."
    assert layout.heads[attention + "q_proj"] == ((4, 8),)
    assert layout.heads[attention + "k_proj"] == ((2, 8),)
    assert layout.heads[attention + "v_proj"] == ((2, 8),)
    assert attention + "o_proj" not in layout.heads
    assert layout.outputs == {"lm_head"}


def test_observe_pieces():
    layout = observe(small.phi3().to("meta"))
    assert layout.pieces["model.layers.0.mlp.gate_up_proj"] == (64, 64)
    assert layout.pieces["model.layers.0.self_attn.qkv_proj"] == (32, 32, 32)
    assert layout.heads["model.layers.0.self_attn.qkv_proj"] == ((4, 8),) * 3


def test_observe_fused_by_thirds_and_by_heads():
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=40, n_positions=32)
    layout = observe(meta(GPT2LMHeadModel, config))
    assert layout.heads == {"transformer.h.0.attn.c_attn": ((4, 8),) * 3}
    config = GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=40,
    )
    layout = observe(meta(GPTNeoXForCausalLM, config))
    assert layout.heads == {"gpt_neox.layers.0.attention.query_key_value": ((4, 24),)}


def test_observe_one_key_and_value_for_all_heads_that_stay_as_they_are_cut():
    config = GPTBigCodeConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=40, n_positions=32)
    layout = observe(meta(GPTBigCodeForCausalLM, config))
    assert layout.heads == {"transformer.h.0.attn.c_attn": ((4, 8), (1, 8), (1, 8))}
    assert layout.pieces == {"transformer.h.0.attn.c_attn": (32, 8, 8)}


def test_observe_a_forward_that_needs_values_keeps_what_it_saw():
    class Stops(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(8, 8)
            self.config = None

        def forward(self, input_ids: Any = None) -> Any:
            x = self.q(torch.zeros(1, 3, 8)).view(1, 3, 2, 4)
            raise RuntimeError("needs values")
            return x

    assert observe(Stops().to("meta")).heads == {"q": ((2, 4),)}


def test_observe_runs_text_alone_where_an_image_stops_the_pass():
    layer = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tower = {**layer, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = LlavaConfig(
        text_config={**layer, "model_type": "llama", "num_attention_heads": 2, "vocab_size": 99},
        vision_config={"model_type": "clip_vision_model", **tower},
        image_token_id=5,
    )
    model = meta(LlavaForConditionalGeneration, config)
    recipe = find_recipe(model, None)
    whole = observe(model, recipe)
    assert whole.ended
    model.model.vision_tower.forward = None  # cannot be called
    stopped = observe(model, recipe)
    assert not stopped.ended
    assert 0 < stopped.steps < whole.steps
    assert observe(model, recipe, text_alone=False).steps == 1  # the embedding of its text
