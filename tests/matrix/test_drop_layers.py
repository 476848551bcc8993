"""Whole layers dropped from every class: the config, the outputs, a fresh process, generation.

Asked of each class: the config says what is left, to the letter; the model computes in float64 what
the original does while the dropped layers pass on what they are given; a fresh process loads it
with the same bits; text with a cache is that without.  What no config can say is refused, and
nothing is changed.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import deep_zoo
import pytest
import reload_child
import small
import torch
import zoo
from cases import some_in_make_test
from masked_original import WITHOUT_HEAD, eager
from reloading import assert_reloaded

from tp_hf_config import ConfigSyncError, DroppedLayers, drop_layers

pytestmark = pytest.mark.skipif(
    small.TRANSFORMERS < (5,), reason="the configs of Transformers 4 have other fields"
)
FULL, SLIDING = "full_attention", "sliding_attention"


class Case(NamedTuple):
    """Layers dropped from one list of a class."""

    model: str
    dropped: tuple[int, ...]
    which: str | None = None

    def __str__(self) -> str:
        numbers = ",".join(map(str, self.dropped))
        return "-".join(filter(None, (self.model, self.which, numbers)))


class Run(NamedTuple):
    """A model without some layers, what it was, and the report."""

    original: Any
    model: Any
    report: DroppedLayers


# Case -> what changes in the config.
EXPECTED: dict[Case, dict[str, Any]] = {
    **{
        Case(name, (0, 2)): {"num_hidden_layers": 2}
        for name in ("llama", "mistral", "olmo2", "phi3", "glm4", "mixtral", "bert", "vit")
    },
    Case("llama", (3,)): {"num_hidden_layers": 3},
    Case("qwen2", (1,)): {"num_hidden_layers": 3, "layer_types": [FULL] * 3},
    Case("qwen3", (0, 3)): {"num_hidden_layers": 2, "layer_types": [FULL] * 2},
    Case("smollm3", (0, 1)): {
        "num_hidden_layers": 2,
        "layer_types": [FULL] * 2,
        "no_rope_layers": [0, 1],
    },
    Case("gemma2", (0,)): {"num_hidden_layers": 3, "layer_types": [FULL, SLIDING, FULL]},
    Case("gemma2", (1, 2)): {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
    Case("gemma3", (0, 3)): {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
    Case("gpt_oss", (1,)): {"num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL]},
    Case("qwen3_moe", (0,)): {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    Case("qwen3_moe", (1, 2)): {"num_hidden_layers": 2, "mlp_only_layers": [0]},
    Case("deepseek_v3", (0,)): {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    Case("deepseek_v3", (0, 1)): {"num_hidden_layers": 2, "first_k_dense_replace": 0},
    Case("deepseek_v3", (2,)): {"num_hidden_layers": 3},
    Case("gpt2", (1, 2)): {"n_layer": 2},
    Case("modernbert", (1,)): {"num_hidden_layers": 3, "layer_types": [FULL, SLIDING, FULL]},
    Case("t5", (1, 3), "encoder"): {"num_layers": 4},
    Case("t5", (2,), "decoder"): {"num_decoder_layers": 3},
    Case("bart", (0,), "encoder"): {"encoder_layers": 3},
    Case("bart", (0, 2), "decoder"): {"decoder_layers": 2},
    Case("whisper", (1,), "encoder"): {"encoder_layers": 3},
    Case("whisper", (0,), "decoder"): {"decoder_layers": 3},
    Case("dinov2", (0, 2)): {
        "num_hidden_layers": 2,
        "out_features": ["stage2"],
        "out_indices": [2],
        "stage_names": ["stem", "stage1", "stage2"],
    },
    Case("swin", (1, 2), "swin.encoder.layers.1.blocks"): {"depths": [2, 2]},
    Case("swin", (1,), "swin.encoder.layers.0.blocks"): {"depths": [1, 4]},
    Case("wav2vec2", (0, 2)): {"num_hidden_layers": 2},
    Case("qwen2_vl", (1,), "language_model"): {
        "text_config.num_hidden_layers": 3,
        "text_config.layer_types": [FULL] * 3,
    },
    Case("qwen2_vl", (0, 3), "visual"): {"vision_config.depth": 2},
}
# Case -> a part of the reason why it is refused.
REFUSED = {
    Case("t5", (0,), "encoder"): r"encoder\.block\.1\.layer\.0\.SelfAttention"
    r"\.has_relative_attention_bias is False, and as layer 0 it would be True",
    Case("modernbert", (0,)): r"model\.layers\.1\.attn_norm is a LayerNorm, and as layer 0 it",
    Case("swin", (0,), "swin.encoder.layers.1.blocks"): r"blocks\.1\.shift_size is 2, and as layer "
    "0 it would be 0",
}
WITHOUT_STATIC_CACHE = ("qwen2_vl",)


@functools.cache
def run_of(case: Case) -> Run:
    """Drop a case's layers, in float64; once, for all tests that ask about it."""
    model = deep_zoo.build(case.model).double()
    original = copy.deepcopy(model)
    return Run(original, model, drop_layers(model, case.dropped, which=case.which))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's fields, those of configs in it by their path."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = key.endswith("_config") and isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


LIKE_LLAMA = ("mistral", "olmo2", "phi3", "glm4", "qwen2", "smollm3")
CASES = some_in_make_test(EXPECTED, lambda case: case.model not in LIKE_LLAMA)


@pytest.mark.parametrize("case", CASES)
def test_layers_dropped(case: Case, collector: Any) -> None:
    """The config says so, layers and outputs are the original's, a fresh process loads the same."""
    run = run_of(case)
    assert_config_says_what_is_left(case, run)
    assert_layers_are_the_original_ones(case, run)
    assert_computes_what_the_original_does_without_them(case, run)
    assert_text_with_a_cache_is_that_without(case, run)
    if case.model not in WITHOUT_HEAD:
        model = copy.deepcopy(run.model).float()
        model.config.dtype = torch.float32
        assert_reloaded(collector.reloaded(model, zoo.inputs(model)))


def assert_config_says_what_is_left(case: Case, run: Run) -> None:
    before, after = (flat(one.config.to_dict()) for one in (run.original, run.model))
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    assert changed == EXPECTED[case]
    assert {name: new for name, (_, new) in run.report.fields.items()} == EXPECTED[case]
    assert before.keys() == after.keys()
    built = type(run.model)(copy.deepcopy(run.model.config))
    assert {n: p.shape for n, p in built.named_parameters()} == {
        n: p.shape for n, p in run.model.named_parameters()
    }


def assert_layers_are_the_original_ones(case: Case, run: Run) -> None:
    before, after = (one.get_submodule(run.report.layers) for one in (run.original, run.model))
    assert run.report.dropped == case.dropped
    assert len(after) == len(run.report.kept) == len(before) - len(case.dropped)
    for new, old in enumerate(run.report.kept):
        assert all(
            torch.equal(a, b)
            for a, b in zip(before[old].parameters(), after[new].parameters(), strict=True)
        )
        numbers = {m.layer_idx for m in after[new].modules() if hasattr(m, "layer_idx")}
        assert numbers <= {new, None}


def assert_computes_what_the_original_does_without_them(case: Case, run: Run) -> None:
    expected = deep_zoo.passing_on(run.original, run.report.layers, case.dropped)
    inputs = {
        key: value.double() if value.is_floating_point() else value
        for key, value in zoo.inputs(run.original).items()
    }
    models = (expected, copy.deepcopy(run.model))
    outputs = [reload_child.outputs_of(eager(model), inputs) for model in models]
    assert outputs[0].keys() == outputs[1].keys()
    for key, value in outputs[0].items():
        error = ((outputs[1][key] - value).norm() / value.norm()).item()
        assert error <= 1e-9, f"{key}: relative error {error:.1e}"
    whole = reload_child.outputs_of(eager(copy.deepcopy(run.original)), inputs)
    assert any((whole[key] - outputs[1][key]).abs().max() > 1e-6 for key in whole)


def assert_text_with_a_cache_is_that_without(case: Case, run: Run) -> None:
    model = copy.deepcopy(run.model).float()
    inputs = zoo.inputs(model)
    if not model.can_generate() or "input_ids" not in inputs:
        return
    ways: list[dict[str, Any]] = [{"use_cache": True}, {"use_cache": False}]
    if not model.config.is_encoder_decoder and case.model not in WITHOUT_STATIC_CACHE:
        ways.append({"cache_implementation": "static"})
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    texts = [model.generate(**inputs, **settings, **way) for way in ways]
    assert all(torch.equal(text, texts[0]) for text in texts)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_no_config_can_say_is_refused_and_nothing_is_changed(case: Case) -> None:
    model = deep_zoo.build(case.model)
    before = small.state_of(model)
    with pytest.raises(ConfigSyncError, match=REFUSED[case]):
        drop_layers(model, case.dropped, which=case.which)
    small.assert_same(before, small.state_of(model))
