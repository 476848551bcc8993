"""The memory that calibrating takes, foretold without weights and without data."""

from __future__ import annotations

from pathlib import Path

import calibrated
import pytest
import small
import torch
import transformers as hf

from tp_hf_config import calibrate, plan
from tp_hf_config.calibration import measured
from tp_hf_config.calibration.linear_ops import Consumer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]
NAMES = ["llama", "gpt2", "qwen3_moe", "deepseek_v3", "bert", "t5", "vit", "mamba2", "convnext"]
EXPERTS = [n for n in NAMES if n in ("qwen3_moe", "deepseek_v3")]


@pytest.mark.parametrize("name", calibrated.others_full(NAMES, [*EXPERTS, "t5", "mamba2"]))
def test_what_a_plan_foretells_is_what_calibrating_takes(name: str) -> None:
    if name in EXPERTS and small.TRANSFORMERS < (5,):
        pytest.skip("an expert that gets no tokens is not there in Transformers 4")
    model = calibrated.build(name, torch.float32)
    calibration = calibrate(model, calibrated.batches(model, 20))
    assert plan(model).before.gram_bytes == calibration.memory


def test_all_layers_of_a_deep_model_count() -> None:
    config = hf.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    result = plan(config, ratios={"intermediate_size": 0.25})
    assert result.before.gram_bytes == 32 * 4 * (4096**2 + 14336**2)
    assert result.after is not None
    assert result.after.gram_bytes == 32 * 4 * (4096**2 + 10752**2)
    assert "bytes to calibrate: 28,454,158,336 -> 16,944,988,160 (59.6%)" in result.text(full=True)


def test_a_second_process_needs_no_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TP_HF_CONFIG_CACHE", str(tmp_path))
    config = hf.LlamaConfig(hidden_size=96, intermediate_size=80, num_attention_heads=3)
    first = plan(config).before.gram_bytes
    monkeypatch.delattr(measured, "experiments_of")
    assert plan(config).before.gram_bytes == first == 32 * 4 * (96**2 + 80**2)


def test_norms_are_seen_where_a_cache_would_copy_what_they_give() -> None:
    model = calibrated.build("deepseek_v3", torch.float32)
    assert model.config.use_cache
    readings = calibrate(model, calibrated.batches(model, 2)).readings
    reader = Consumer("model.layers.0.self_attn.kv_b_proj.weight", 1)
    assert readings.chains[reader] == ("model.layers.0.self_attn.kv_a_layernorm",)
    assert model.config.use_cache
