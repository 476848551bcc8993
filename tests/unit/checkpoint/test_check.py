"""A folder's config against its weights: sound ones stay sound, broken ones get their cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folders
import pytest
import small
import torch
import transformers as hf
from other_thread import in_another_thread
from safetensors.torch import load_file, save_file
from shell import shell
from torch import nn

from tp_hf_config import CheckpointError, check_checkpoint
from tp_hf_config.checkpoint.building import Classes, own_reference, too_large
from tp_hf_config.model.build import _limited

SOUND = (
    "llama",
    "llama-tied",
    "bert",
    "gpt2",
    "t5",
    "mixtral",
    "deepseek_v3",
    "qwen2_vl",
    "llava",
    "whisper",
    "clip",
    "mamba2",
    "swin",
    "wav2vec2",
)


def causes(folder: Path) -> list[str]:
    report = check_checkpoint(folder)
    assert report.sound is False
    assert report.why_not is None
    return [cause.text for cause in report.causes]


# What a class saves is sound


@pytest.mark.parametrize("name", SOUND)
def test_what_a_class_saves_is_sound(name: str, tmp_path: Path):
    folder = folders.saved(name, tmp_path)
    before = folders.files(folder)
    report = check_checkpoint(folder)
    assert (report.sound, report.causes, report.notes) == (True, (), ())
    assert folders.files(folder) == before


def test_a_report_says_what_was_looked_at(tmp_path: Path):
    folder = folders.saved("llama", tmp_path)
    report = check_checkpoint(folder)
    assert str(report) == (
        f"{folder}: sound\n  LlamaForCausalLM: 21 tensors, 74,432 parameters, 1 file"
    )
    data = json.loads(json.dumps(report.to_dict()))
    assert data["schema_version"] == 1
    assert data["sound"] is True
    assert data["versions"]["transformers"] == hf.__version__


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_shards_are_sound(name: str, tmp_path: Path):
    folder = folders.saved(name, tmp_path, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    report = check_checkpoint(folder)
    assert report.sound is True
    assert len(report.files) == len(list(folder.glob("*.safetensors")))


def test_pickled_weights_are_not_read(tmp_path: Path):
    folder = folders.saved("bert", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    report = check_checkpoint(folder)
    assert (report.sound, report.files) == (None, ("pytorch_model.bin",))
    assert report.why_not == (
        "pytorch_model.bin is a pickle, which has no header with shapes. Save the weights as "
        "safetensors"
    )


@pytest.mark.parametrize("into", ["base", "task"])
def test_the_prefix_of_the_base_model_may_be_there_or_not(into: str, tmp_path: Path):
    folder = folders.saved("bert-lm" if into == "base" else "bert", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    if into == "base":
        folders.edit(folder, architectures=["BertModel"])
        assert check_checkpoint(folder).sound is folders.loads(folder)
        return
    bare = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    save_file(
        {k: v for k, v in bare.items() if not k.startswith("classifier")},
        folder / "model.safetensors",
    )
    folders.edit(folder, architectures=["BertModel"])
    assert folders.loads(folder)
    assert check_checkpoint(folder).sound is True


def test_another_head_in_the_weights_is_only_noted(tmp_path: Path):
    folder = folders.saved("bert-lm", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.seq_relationship.weight"] = torch.zeros(2, 64)
    save_file(tensors, folder / "model.safetensors")
    assert folders.loads(folder)
    report = check_checkpoint(folder)
    assert report.sound is True
    assert report.notes == ("not used by this class: cls.seq_relationship.weight",)


def test_linked_files_as_in_the_hub_cache_are_read(tmp_path: Path):
    folder = folders.saved("llama", tmp_path)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    assert check_checkpoint(folder).sound is True


# What is wrong is said once, by its cause


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        (
            "llama",
            {"intermediate_size": 80},
            ["intermediate_size says 80, but the weights of layers 0-1 hold 96"],
        ),
        (
            "llama",
            {"num_hidden_layers": 3},
            [
                "9 tensors are missing from the weights; LlamaForCausalLM would initialise them "
                "randomly: "
                "model.layers.*.input_layernorm.weight, model.layers.*.mlp.down_proj.weight, "
                "model.layers.*.mlp.gate_proj.weight (and 6 more)"
            ],
        ),
        (
            "llama-tied",
            {"tie_word_embeddings": False},
            ["tie_word_embeddings says false, but the weights need true"],
        ),
        (
            "qwen3",
            {"head_dim": None},
            ["head_dim is not set, which means 128, but the weights of layers 0-1 hold 12"],
        ),
        (
            "bert",
            {"intermediate_size": 100, "vocab_size": 50},
            [
                "intermediate_size says 100, but the weights of layers 0-1 hold 96",
                "vocab_size says 50, but the weights of bert.embeddings.word_embeddings.weight "
                "hold 99",
            ],
        ),
        (
            "mixtral",
            {"num_local_experts": 8},
            ["num_local_experts says 8, but the weights of layers 0-1 hold 4"]
            if small.TRANSFORMERS >= (5,)  # one tensor of all experts; before a list of modules
            else [
                "24 tensors are missing from the weights; MixtralForCausalLM would initialise them "
                "randomly: "
                "model.layers.*.block_sparse_moe.experts.4.w1.weight, "
                "model.layers.*.block_sparse_moe.experts.4.w2.weight, "
                "model.layers.*.block_sparse_moe.experts.4.w3.weight (and 9 more)"
            ],
        ),
        (
            "t5",
            {"d_ff": 55},
            [
                "d_ff says 55, but the weights of layers 0-1 of decoder.block and layers 0-1 of "
                "encoder.block hold 96",
            ],
        ),
        ("gpt2", {"n_embd": 32}, ["n_embd says 32, but the weights of layers 0-1 hold 64"]),
        (
            "llama",
            {"num_attention_heads": 2},
            [
                "the shapes fit head_dim=16, num_attention_heads=4, num_key_value_heads=2 or "
                "head_dim=32, num_attention_heads=2, num_key_value_heads=1, and no shape shows "
                "which one is right"
            ],
        ),
    ],
)
def test_causes(name: str, fields: dict[str, Any], expected: list[str], tmp_path: Path):
    folder = folders.edit(folders.saved(name, tmp_path), **fields)
    assert causes(folder) == expected


def test_layers_that_need_different_widths_are_told_apart(tmp_path: Path):
    folder = folders.with_a_narrow_layer(tmp_path)
    assert causes(folder) == [
        "intermediate_size would need several values at once: 64 in layers 0-2, 4-5; 40 in layer 3"
    ]


def test_a_shape_that_no_field_sets(tmp_path: Path):
    folder = folders.saved("vit", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["vit.embeddings.cls_token"] = torch.zeros(1, 2, 64)
    save_file(tensors, folder / "model.safetensors")
    found = causes(folder)
    assert found[0] == (
        "vit.embeddings.cls_token has shape [1, 2, 64], but the config builds [1, 1, 64]"
    )
    assert "no width of ViTConfig gives vit.embeddings.cls_token" in found[1]


def test_missing_tensors_are_one_cause(tmp_path: Path):
    folder = folders.saved("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".mlp.up_proj" not in name},
        folder / "model.safetensors",
    )
    assert causes(folder) == [
        "2 tensors are missing from the weights; LlamaForCausalLM would initialise them randomly: "
        "model.layers.*.mlp.up_proj.weight"
    ]


def test_tensors_without_a_place_are_one_cause(tmp_path: Path):
    folder = folders.saved("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.norm.weight"] = torch.zeros(96)
    save_file(tensors, folder / "model.safetensors")
    assert causes(folder) == [
        "2 tensors are in the weights, but not in LlamaForCausalLM with this config: "
        "model.layers.*.mlp.norm.weight"
    ]


def test_tied_tensors_that_differ_in_the_files(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), tie_word_embeddings=True)
    report = check_checkpoint(folder)
    names = "lm_head.weight and model.embed_tokens.weight"
    text = f"the config ties {names}, which hold different numbers"
    if small.TRANSFORMERS >= (5,):  # loads them untied
        assert report.sound is True
        assert report.notes == (
            f"{text}; Transformers loads them untied, and repair corrects the config",
        )
    else:
        assert [cause.text for cause in report.causes] == [text]


def test_no_quantisation(tmp_path: Path):
    """What is null in config.json is not there; Transformers 4 does not load such a folder."""
    folder = folders.saved("llama", tmp_path)
    data = {**folders.config_of(folder), "quantization_config": None}
    (folder / "config.json").write_text(json.dumps(data))
    report = check_checkpoint(folder)
    if small.TRANSFORMERS >= (5,):
        assert report.sound is True
    else:
        assert "LlamaConfig refuses config.json: 'NoneType' object has no" in str(report)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_that_is_quantised(part: str, tmp_path: Path):
    """Transformers reads it out of the text model's config too."""
    folder = folders.saved("llava", tmp_path)
    inner = folders.config_of(folder)[part]
    folders.edit(folder, **{part: {**inner, "quantization_config": {"quant_method": "fp8"}}})
    report = check_checkpoint(folder)
    assert (report.sound, report.causes) == (None, ())
    why = "the weights are quantised (quantization_config), and packed shapes show no widths"
    assert report.why_not == why


def test_an_adapter_beside_the_weights_is_noted(tmp_path: Path):
    folder = folders.saved("llama", tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    report = check_checkpoint(folder)
    assert (report.sound, report.causes) == (True, ())
    assert report.notes == (
        "the folder contains an adapter (adapter_config.json), which was not checked; "
        "from_pretrained adds it to the model if peft is installed",
    )


def test_a_config_that_the_class_refuses(tmp_path: Path):
    folder = folders.edit(folders.saved("gpt2", tmp_path), n_head=3)
    assert causes(folder)[0].startswith("GPT2Config refuses config.json: `embed_dim` must be ")


# What cannot be told is not guessed


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (
            {"architectures": None},
            "config.json names no class. Add the one that the weights were saved from: "
            '"architectures": ["LlamaForCausalLM"]',
        ),
        ({"architectures": ["AutoModel"]}, "has no class AutoModel, which config.json names"),
        ({"architectures": ["os"]}, "has no class os, which config.json names"),
        (
            {"model_type": "bert"},
            'model_type is "bert", but LlamaForCausalLM (architectures) needs a LlamaConfig',
        ),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised (quantization_config)"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers is 1,000,000,000, far larger than any size",
        ),
        ({"num_labels": 10**9}, "num_labels is 1,000,000,000, far larger than any size in the"),
    ],
)
def test_could_not_tell(fields: dict[str, Any], why: str, tmp_path: Path):
    report = check_checkpoint(folders.edit(folders.saved("llama", tmp_path), **fields))
    assert report.sound is None
    assert report.causes == ()
    assert report.why_not is not None
    assert why in report.why_not
    assert f"could not tell\n  {report.model or 'unknown class'}" in str(report)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist. Give the folder that contains config.json."),
        (lambda path: path.write_text(""), "is not a folder. Give the folder that contains"),
        (lambda path: path.mkdir(), "has no config.json. Give the folder that contains it."),
    ],
)
def test_no_folder_with_a_config(make: Any, message: str, tmp_path: Path):
    make(tmp_path / "it")
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(tmp_path / "it")
    assert message in str(error.value)


def test_no_weights(tmp_path: Path):
    folder = folders.saved("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"There is model.fp16.safetensors, which from_pre"):
        check_checkpoint(folder)


# Size does not matter


def test_a_large_number_that_the_class_does_not_read(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), num_train_tokens=15 * 10**9)
    assert check_checkpoint(folder).sound is True
    folders.edit(folder, intermediate_size=80)
    assert causes(folder) == ["intermediate_size says 80, but the weights of layers 0-1 hold 96"]


def test_a_rotary_base_is_no_size(tmp_path: Path):
    config = hf.GPTNeoXConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    hf.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    data = folders.config_of(tmp_path)
    data.pop("rope_parameters", None)
    data |= {"rotary_emb_base": 5_000_000, "rotary_pct": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(data))
    report = check_checkpoint(tmp_path)
    assert (report.sound, report.why_not, report.causes) == (True, None, ())


@pytest.mark.parametrize(
    ("config", "model", "data", "read"),
    [
        (hf.GPT2Config, hf.GPT2Model, {"n_layer": 10**9}, "n_layer"),
        (hf.GPT2Config, hf.GPT2Model, {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        (hf.BloomConfig, hf.BloomModel, {"n_embed": 10**9}, "n_embed"),  # no field, no alias
        (hf.GPT2Config, hf.GPT2Model, {"seen": {"tokens": [10**9]}, "n_layer": 2}, None),
        (hf.GPT2Config, hf.GPT2Model, {"seen": 10**9, "n_layer": 10**9}, "n_layer"),
        (hf.GPT2Config, hf.GPT2Model, {"seen": [10**9] * 10**5}, None),
        (hf.SwinConfig, hf.SwinModel, {"depths": [2, 10**9]}, "depths[1]"),
        (hf.GPTNeoXConfig, hf.GPTNeoXModel, {"rotary_emb_base": 10**9, "rope_theta": 10**9}, None),
        (
            hf.LlavaConfig,
            hf.LlavaModel,
            {"text_config": {"model_type": "llama", "vocab_size": 10**9}},
            "text_config.vocab_size",
        ),
    ],
)
def test_large_numbers_that_a_class_reads(
    config: Any, model: Any, data: dict[str, Any], read: str | None
):
    found = too_large(Classes(config, model, 100), data, {})
    assert (found is None) == (read is None)
    assert read is None or str(found).startswith(f"{read} is 1,000,000,000, far larger than any")


@pytest.mark.full
def test_a_70b_folder_of_holes(tmp_path: Path):
    config = hf.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in hf.LlamaForCausalLM(config).state_dict().items()
        }
    weight_map = {}
    for shard in range(30):
        name = f"model-{shard + 1:05d}-of-00030.safetensors"
        part = dict(list(shapes.items())[shard::30])
        folders.sparse(tmp_path / name, part)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    report = check_checkpoint(tmp_path)
    assert (report.sound, report.tensors, len(report.files)) == (True, 723, 30)
    assert report.parameters == 70_553_706_496
    folders.edit(tmp_path, intermediate_size=28000)
    assert causes(tmp_path) == [
        "intermediate_size says 28,000, but the weights of layers 0-79 hold 28,672"
    ]


# The command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = folders.saved("llama", tmp_path)
    code, out, _ = shell(capsys, "check", folder, "--json")
    assert (code, json.loads(out)["sound"]) == (0, True)
    folders.edit(folder, intermediate_size=80)
    code, out, _ = shell(capsys, "check", folder)
    assert code == 1
    assert out.endswith("intermediate_size says 80, but the weights of layers 0-1 hold 96\n")
    _, out, _ = shell(capsys, "check", folder, "--json")
    assert json.loads(out)["causes"][0]["holds"] == 96
    folders.edit(folder, architectures=None)
    assert shell(capsys, "check", folder)[0] == 2


def test_the_class_of_a_folder_with_code_is_a_model() -> None:
    """Not the processor's, which may stand first."""
    code = {"AutoConfig": "a.Config", "AutoProcessor": "b.Processor", "AutoModel": "a.Model"}
    assert own_reference({"auto_map": code}) == "a.Model"
    code["AutoModelForCausalLM"] = "a.Writer"
    assert own_reference({"auto_map": code, "architectures": ["Writer"]}) == "a.Writer"
    assert own_reference({"auto_map": {"AutoProcessor": "b.Processor"}}) is None


def test_the_most_modules_are_those_of_one_thread() -> None:
    with _limited(1, "more than the weights"):
        nn.Sequential(nn.ReLU())
        with pytest.raises(ValueError, match="more than 1 modules"):
            nn.Sequential(nn.ReLU())
        assert len(in_another_thread(lambda: nn.Sequential(nn.ReLU(), nn.ReLU()))) == 2
