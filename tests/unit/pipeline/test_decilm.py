"""Llamas whose layers differ as vLLM serves them: what is in the folder, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import differing
import layer_zoo
import model_folders as folders
import pytest
import torch
import transformers as hf
import zoo
from safetensors.torch import load_file
from shell import shell
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tp_hf_config import PipelineError, export
from tp_hf_config.model.layer_entries import GLOBAL_READS, set_entries

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not layer_zoo.ENTRIES, reason="this Transformers reads no per_layer_config from a config"
    ),
]
FFN = ("intermediate_size",)


def mistral(window: int | None) -> Callable[[], Any]:
    return lambda: (
        hf.MistralForCausalLM,
        hf.MistralConfig(**zoo._GQA, head_dim=12, sliding_window=window),
    )


layer_zoo._MORE.update({"mistral_all": mistral(None), "mistral_40": mistral(40)})
layer_zoo._MORE["llama_tied"] = lambda: (
    hf.LlamaForCausalLM,
    hf.LlamaConfig(**{**zoo._GQA, "tie_word_embeddings": True}),
)


def served(folder: Path) -> hf.LlamaForCausalLM:
    """What DeciLM is: a Llama with the widths of ``block_configs``, as vLLM reads them."""
    data = json.loads((folder / "config.json").read_text())
    blocks = data.pop("block_configs")
    for key in ("architectures", "auto_map", "model_type"):
        data.pop(key)
    config = hf.LlamaConfig(**data)
    model = hf.LlamaForCausalLM(config)
    for number, block in enumerate(blocks):
        own = copy.deepcopy(config)
        own.intermediate_size = block["ffn"]["intermediate_size"]
        own.num_key_value_heads = (
            config.num_attention_heads // block["attention"]["n_heads_in_group"]
        )
        model.model.layers[number] = LlamaDecoderLayer(own, number)
    weights = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    model.tie_weights()
    return model.eval()


def assert_served_the_same(model: Any, folder: Path) -> None:
    inputs = zoo.inputs(model)
    with torch.no_grad():
        expected, found = model(**inputs).logits, served(folder)(**inputs).logits
    assert (expected - found).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "mistral_all"])
def test_a_llama_of_several_widths(name: str, tmp_path: Path) -> None:
    model = differing.pruned(name, FFN)
    report = export(model, tmp_path / "out", to="decilm")
    assert_served_the_same(model, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert data["architectures"] == ["DeciLMForCausalLM"]
    assert data["model_type"] == "nemotron-nas"
    assert data["dtype"] == "float32"
    assert data["rope_theta"] == 10000.0
    ffn = [block["ffn"] for block in data["block_configs"]]
    assert [entry["intermediate_size"] for entry in ffn] == [72, 48]
    assert not any("ffn_mult" in entry for entry in ffn)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in weights.items():
        same = torch.equal(value, model.state_dict()[key]) if key in model.state_dict() else None
        assert same or (name == "qwen2" and key.endswith("o_proj.bias") and not value.any())
    assert report.fields == {"intermediate_size": ((72, 48), (72, 48))}


def test_key_value_heads_by_layer_with_the_same_query_heads(tmp_path: Path) -> None:
    """Padded, each key/value head needs as many query heads as the fullest: 2 x 4."""
    pruned = differing.pruned("llama", FFN)
    config = copy.deepcopy(pruned.config)
    vars(config)[GLOBAL_READS] = True
    entries = [(72, 2), (48, 1)]
    set_entries(
        config,
        {
            number: {"intermediate_size": ffn, "num_key_value_heads": keys}
            for number, (ffn, keys) in enumerate(entries)
        },
    )
    torch.manual_seed(0)
    model = type(pruned)(config).eval()
    export(model, tmp_path / "out", to="decilm")
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [block["attention"]["n_heads_in_group"] for block in data["block_configs"]] == [2, 4]
    assert_served_the_same(model, tmp_path / "out")
    export(model, tmp_path / "padded", to="padded")
    padded = hf.LlamaForCausalLM.from_pretrained(tmp_path / "padded")
    assert (padded.config.num_attention_heads, padded.config.num_key_value_heads) == (8, 2)
    inputs = zoo.inputs(model)
    with torch.no_grad():
        expected, found = model(**inputs).logits, padded(**inputs).logits
    assert (expected - found).norm() <= 1e-5 * expected.norm()


def test_the_config_loads_with_its_entries_as_attributes(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    differing.pruned("llama", FFN).save_pretrained(folder)
    folders.save_tokenizer(folder)
    report = export(folder, out, to="decilm", trust_remote_code=True)
    assert report.copied.files == ("tokenizer.json", "tokenizer_config.json")
    assert sorted(folders.content(out)) == [
        "README.md",
        "config.json",
        "configuration_decilm.py",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = hf.AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert config.model_type == "nemotron-nas"
    first, second = config.block_configs
    assert (first.ffn.intermediate_size, second.ffn.intermediate_size) == (72, 48)
    assert not hasattr(first.ffn, "ffn_mult")
    assert (first.attention.no_op, first.attention.n_heads_in_group) == (False, 2)
    again = copy.deepcopy(config)
    again.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["block_configs"] == json.loads((out / "config.json").read_text())["block_configs"]


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("llama", ("num_attention_heads",), r"its layers have 2 or 4 query heads, and Deci"),
        ("gemma2", FFN, r"a Llama has other tensors: model\.layers\.0\.post_feedforward"),
        ("phi3", FFN, r"a Llama has other tensors: model\.layers\.0\.mlp\.gate_proj"),
        ("smollm3", FFN, r"a Llama with its weights computes something else: outputs are"),
        ("mistral_40", FFN, r"sliding_window 40 can change what it computes, and a Llama h"),
        ("mixtral", ("num_local_experts",), r"zeros are not neutral in num_local_experts"),
    ],
)
def test_what_decilm_does_not_express_is_refused(
    name: str, fields: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    model = differing.pruned(name, fields)
    with pytest.raises(PipelineError, match=rf"^to='decilm': this .* written so: {reason}"):
        export(model, tmp_path / "out", to="decilm")
    assert not list(tmp_path.iterdir())


def test_the_command(capsys: Any, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    differing.pruned("llama", FFN).save_pretrained(folder)
    typed = ("export", folder, "--to", "decilm", "--out", out, "--trust-remote-code")
    code, printed, errors = shell(capsys, *typed)
    assert code == 0, errors
    assert "LlamaForCausalLM, decilm: intermediate_size 48..72 -> 48..72" in printed
    assert "vllm.LLM(folder, trust_remote_code=True)" in (out / "README.md").read_text()
