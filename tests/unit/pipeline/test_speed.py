"""How fast a model answers: what is measured, and that the model is left as it was."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from tp_hf_config import UnsupportedModelError, measure_speed
from tp_hf_config.pipeline import speed

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama(**settings: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50, **settings))


def t5() -> T5ForConditionalGeneration:
    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=50, decoder_start_token_id=0))


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second whenever it is read: before a run, and at every token."""
    ticks = itertools.count()
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.mark.parametrize("model", [llama(), t5()], ids=["decoder", "encoder-decoder"])
def test_tokens_are_counted_one_by_one(model: Any, ticking: None) -> None:
    measured = measure_speed(model, batch=3, prompt=4, new_tokens=6, runs=2)
    once = speed.Spread(1.0, 1.0, 1.0)
    assert measured.first_token_seconds == once
    assert measured.tokens_per_second == speed.Spread(3.0, 3.0, 3.0)  # three sequences a second
    assert measured.forward_seconds is None
    assert measured.runs == 2


def test_one_new_token_has_no_rate(ticking: None) -> None:
    measured = measure_speed(llama(), prompt=4, new_tokens=1, runs=2)
    assert measured.tokens_per_second is None
    assert measured.first_token_seconds is not None


def test_an_end_of_text_ends_nothing() -> None:
    model = llama()
    model.generation_config.eos_token_id = list(range(49))
    assert measure_speed(model, prompt=4, new_tokens=5, runs=1).tokens_per_second is not None


def test_an_encoder_runs_on_the_prompt(ticking: None) -> None:
    model = BertModel(BertConfig(**SIZES, vocab_size=50))
    measured = measure_speed(model, batch=2, prompt=8, runs=2)
    assert measured.forward_seconds == speed.Spread(1.0, 1.0, 1.0)
    assert measured.tokens_per_second == speed.Spread(16.0, 16.0, 16.0)
    assert measured.first_token_seconds is None


def test_images_are_given() -> None:
    model = ViTModel(ViTConfig(**SIZES, image_size=8, patch_size=4))
    with pytest.raises(UnsupportedModelError, match=r"ViTModel does not run on tokens.*inputs="):
        measure_speed(model)
    measured = measure_speed(model, inputs={"pixel_values": torch.zeros(1, 3, 8, 8)}, runs=1)
    assert measured.tokens_per_second is None
    assert measured.forward_seconds is not None
    with pytest.raises(UnsupportedModelError, match="does not run on these inputs"):
        measure_speed(model, inputs={"pixel_values": torch.zeros(1)})


def test_more_than_the_positions_is_refused() -> None:
    model = llama(max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"prompt=12 and new_tokens=8: .* has 16 positions"):
        measure_speed(model, prompt=12, new_tokens=8)


def test_the_model_is_left_as_it_was() -> None:
    model = llama()
    model.train()
    model.model.layers[0].eval()
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    modes = [module.training for module in model.modules()]
    settings = model.generation_config.to_dict()
    state = torch.get_rng_state()
    measure_speed(model, prompt=4, new_tokens=2, runs=1)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.to_dict() == settings
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_is_the_weights_and_what_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    kept = [*model.parameters(), *model.buffers()]
    weights = sum(one.numel() * one.element_size() for one in kept)
    peaks = iter([1000, 1700])
    monkeypatch.setattr(speed, "_resident", lambda name: next(peaks))
    assert measure_speed(model, prompt=4, new_tokens=2, runs=1).memory == weights + 700
    monkeypatch.setattr(speed, "_PEAK", speed.Path("/nowhere/at/all"))  # not Linux
    assert measure_speed(model, prompt=4, new_tokens=2, runs=1).memory is None


def test_a_report(ticking: None) -> None:
    measured = measure_speed(llama(), prompt=4, new_tokens=3, runs=2)
    first, *lines = str(measured).splitlines()
    threads = torch.get_num_threads()
    assert first == (
        f"LlamaForCausalLM in float32 on cpu, {threads} threads: batch 1, prompt of 4 tokens, "
        "3 new tokens, median of 2 runs (lowest to highest)"
    )
    assert lines[:2] == [
        "time to the first token in ms: 1,000.0 (1,000.0 to 1,000.0)",
        "tokens per second: 1.0 (1.0 to 1.0)",
    ]
    assert measured.to_dict()["tokens_per_second"] == {"median": 1, "lowest": 1, "highest": 1}
    change = "time to the first token in ms 1,000.0 -> 1,000.0, tokens per second 1.0 -> 1.0"
    assert measured.then(measured).startswith(
        f"speed on cpu, {threads} threads (batch 1, prompt of 4 tokens, 3 new tokens): {change}, "
    )
