"""Entries for single layers in a config, and the generated class that builds layers from them."""

from __future__ import annotations

import copy
import errno
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import layer_zoo
import pytest
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    LxmertConfig,
    LxmertModel,
)
from transformers.dynamic_module_utils import custom_object_save

from tp_hf_config import HFConfigSyncHook, UnsupportedModelError
from tp_hf_config.graph.layer_fields import _in_single_layer, layers_listed
from tp_hf_config.model import layer_class, layer_entries
from tp_hf_config.model.layer_class import layer_lists, stock_class
from tp_hf_config.model.layer_entries import (
    entries_of,
    layer_lists_of,
    name_in_all_layers,
    set_entries,
    shared_field,
    uniform_json,
)
from tp_hf_config.twin.layout import TensorDim, TinyGroup

pytestmark = pytest.mark.skipif(
    not layer_zoo.ENTRIES, reason="this Transformers reads no per_layer_config from a config"
)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "bert", "whisper", "vit", "qwen2_vl"])
def test_a_model_is_the_same_while_it_is_listed_and_as_it_was_afterwards(name: str) -> None:
    model: Any = layer_zoo.build(name)
    stock, text = type(model), model.config.to_json_string(use_diff=False)
    configs = [id(vars(module).get("config")) for module in model.modules()]
    inputs = zoo.inputs(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        with layers_listed(model):
            assert stock_class(type(model)) is stock
            assert layer_lists(type(model))
            assert torch.equal(model(**inputs)[0], before)
            built = type(model)(copy.deepcopy(model.config))
            assert built.state_dict().keys() == model.state_dict().keys()
    assert type(model) is stock
    assert model.config.to_json_string(use_diff=False) == text
    assert [id(vars(module).get("config")) for module in model.modules()] == configs


def test_what_a_class_refuses_for_all_layers_stays_in_entries(tmp_path: Path) -> None:
    """Three heads do not divide a hidden size of 64; head_dim says how wide they are."""
    model: Any = layer_zoo.build("llama")
    with layers_listed(model):
        entry = {"intermediate_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
        set_entries(model.config, {0: entry, 1: entry})
    assert type(model).__name__ == "LayerwiseLlamaForCausalLM"
    assert entries_of(model.config) == {0: entry, 1: entry}
    assert vars(model.config)["num_attention_heads"] == 4
    model.config.save_pretrained(tmp_path)
    again = type(model)(type(model.config).from_pretrained(tmp_path))
    assert [layer.self_attn.q_proj.out_features for layer in again.model.layers] == [48, 48]


def test_an_error_inside_leaves_a_model_as_it_was() -> None:
    model: Any = layer_zoo.build("llama")
    text = model.config.to_json_string(use_diff=False)
    with pytest.raises(RuntimeError, match="inside"), layers_listed(model):
        raise RuntimeError("inside")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.to_json_string(use_diff=False) == text


def test_a_config_with_entries_of_its_own_is_as_it_was() -> None:
    """Gemma 4 sets the wider heads of its full attention by entries."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size_per_layer_input": 0}
    config = hf.Gemma4TextConfig(**sizes, **heads, num_hidden_layers=2, global_head_dim=16)
    model = hf.Gemma4ForCausalLM(config)
    assert entries_of(model.config)
    text = model.config.to_json_string(use_diff=False)
    with layers_listed(model):
        assert model.config.to_json_string(use_diff=False) != text
    assert type(model) is hf.Gemma4ForCausalLM
    assert model.config.to_json_string(use_diff=False) == text


def _disk_full(path: Path, text: str, encoding: str) -> None:
    path.write_bytes(text[:1000].encode())
    raise OSError(errno.ENOSPC, "No space left on device")


def _not_importable(path: Path, text: str, encoding: str) -> None:
    path.write_bytes(f"{text}\nraise RuntimeError('in the module')".encode())


@pytest.mark.parametrize(
    ("write", "error"), [(_disk_full, OSError), (_not_importable, RuntimeError)]
)
def test_a_class_that_cannot_be_written_is_written_the_next_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: Any, error: type[Exception]
) -> None:
    # the classes of other tests lie in the process's own folder
    monkeypatch.setattr(layer_class, "_folder", lambda: tmp_path / "generated")
    model: Any = layer_zoo.build("llama")
    text = model.config.to_json_string(use_diff=False)
    monkeypatch.setattr(layer_class, "_generated", {})
    generated = [name for name in sys.modules if name.startswith(layer_class.GENERATED)]
    for name in generated:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", write)
        with pytest.raises(error), layers_listed(model):
            pass
    assert [name for name in sys.modules if name.startswith(layer_class.GENERATED)] == []
    assert type(model) is hf.LlamaForCausalLM
    assert model.config.to_json_string(use_diff=False) == text
    shutil.rmtree(layer_class._folder())  # a system that cleans up
    with layers_listed(model):
        assert type(model).__name__ == "LayerwiseLlamaForCausalLM"
        assert entries_of(model.config)[1]["intermediate_size"] == model.config.intermediate_size


def test_entries_that_cannot_be_set_leave_a_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = layer_zoo.build("llama")
    before = dict(vars(model.config))
    with monkeypatch.context() as patched:
        patched.setattr(layer_entries, "set_entries", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError), layers_listed(model):
            pass
    assert type(model) is hf.LlamaForCausalLM
    assert vars(model.config) == before
    with layers_listed(model):
        assert layer_lists(type(model)) == ("layers",)


def test_attention_set_on_the_model_reaches_the_layers(tmp_path: Path) -> None:
    model: Any = layer_zoo.build("llama")
    with layers_listed(model):
        set_entries(model.config, {0: {"intermediate_size": 50}, 1: {"intermediate_size": 96}})
        other = type(model)(copy.deepcopy(model.config))
    other.set_attn_implementation("eager")
    kinds = {layer.self_attn.config._attn_implementation for layer in other.model.layers}
    assert kinds == {"eager"}


def test_attention_set_while_a_model_is_built_reaches_the_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Building PeAudioVideoModel reads a property that resets the attention of its text model."""
    build = hf.LlamaModel.__init__

    def build_and_reset(self: Any, config: Any) -> None:
        build(self, config)
        config._attn_implementation = "sdpa"

    model: Any = layer_zoo.build("llama")
    with layers_listed(model):
        set_entries(model.config, {0: {"intermediate_size": 50}, 1: {"intermediate_size": 96}})
        config = copy.deepcopy(model.config)
        config._attn_implementation = "eager"
        monkeypatch.setattr(hf.LlamaModel, "__init__", build_and_reset)
        other = type(model)(config)
    kinds = {layer.self_attn.config._attn_implementation for layer in other.model.layers}
    assert kinds == {"sdpa"}


def test_the_file_needs_nothing_but_transformers(tmp_path: Path) -> None:
    model: Any = layer_zoo.build("llama")
    with layers_listed(model):
        set_entries(model.config, {0: {"intermediate_size": 50}, 1: {"intermediate_size": 96}})
        torch.manual_seed(0)
        other = type(model)(copy.deepcopy(model.config)).eval()
        other.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert "modeling_layerwise_llama.py" in files
    assert "tp_hf_config" not in (tmp_path / "modeling_layerwise_llama.py").read_text().replace(
        "Written by tp_hf_config", ""
    )
    code = (
        "import sys; from transformers import AutoModel, AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        f"inner = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "assert 'tp_hf_config' not in sys.modules\n"
        "print([layer.mlp.up_proj.out_features for layer in model.model.layers],"
        " [layer.mlp.up_proj.out_features for layer in inner.layers])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "[50, 96] [50, 96]"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    (tmp_path / "again").mkdir()
    type(again).from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_layerwise_llama.py").exists()
    assert entries_of(again.config) == {0: {"intermediate_size": 50}, 1: {"intermediate_size": 96}}


def test_names() -> None:
    assert shared_field(("text_config", "per_layer_config", "3", "n")) == ("text_config", "n")
    assert shared_field(("hidden_size",)) == ("hidden_size",)
    joint = "a.per_layer_config.03.n + a.per_layer_config.03.m"
    assert name_in_all_layers(joint) == "a.n + a.m"
    data = {"n": 4, "per_layer_config": {"0": {"n": 3}, "1": {"n": 2}}, "auto_map": {}}
    assert uniform_json(data) == {"n": 3}


def test_a_group_in_the_tenth_layer_is_in_one_layer() -> None:
    def group(*names: str) -> TinyGroup:
        dims = tuple(TensorDim(name, 0) for name in names)
        return TinyGroup((("n",),), dims, (("n",),) * len(dims), 4, 1)

    assert _in_single_layer(group("model.layers.10.up.weight", "model.layers.10.down.weight"))
    assert not _in_single_layer(group("model.layers.1.up.weight", "model.layers.10.up.weight"))
    assert not _in_single_layer(group("model.norm.weight"))


def test_loading_computes_buffers_that_are_not_saved_as_the_stock_class_does(
    tmp_path: Path,
) -> None:
    """Falcon-H1's model computes those of its layers, and has no weights of its own."""
    config = FalconH1Config(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        ssm_multipliers=[0.5, 2.0, 3.0, 0.25, 4.0],
    )
    model = FalconH1ForCausalLM(config).eval()
    with layers_listed(model):
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__name__ == "LayerwiseFalconH1ForCausalLM"
    loaded = dict(again.named_buffers())
    assert "model.layers.1.mamba.mup_vector" in loaded
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded[name], buffer), name


def test_a_config_that_counts_several_lists_in_one_dictionary_has_no_entries() -> None:
    config = LxmertConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=4,
        l_layers=3,
        x_layers=2,
        r_layers=2,
    )
    assert config.num_hidden_layers == {"vision": 2, "cross_encoder": 2, "language": 3}
    model = LxmertModel(config)
    assert layer_lists_of(model) == []
    with pytest.raises(UnsupportedModelError, match="LxmertModel has no list of layers that are"):
        tp.pruner.MetaPruner(
            model,
            example_inputs=None,
            importance=tp.importance.MagnitudeImportance(),
            hooks=[HFConfigSyncHook(per_layer=True)],
        )


def test_a_list_longer_than_the_config_counts_has_no_entries() -> None:
    """UMT5's decoder reads a copy of the config that counts the decoder's layers."""
    config = hf.UMT5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=4
    )
    model: Any = hf.UMT5ForConditionalGeneration(config)
    assert model.decoder.config.num_hidden_layers == 4
    assert [found.name for found in layer_lists_of(model)] == ["encoder.block"]
    with pytest.raises(UnsupportedModelError, match="has no width that UMT5Config could set for"):
        tp.pruner.MetaPruner(
            model,
            example_inputs=None,
            importance=tp.importance.MagnitudeImportance(),
            hooks=[HFConfigSyncHook(per_layer=True)],
        )
    config.num_decoder_layers = 2
    found = layer_lists_of(hf.UMT5ForConditionalGeneration(config))
    assert [one.name for one in found] == ["encoder.block", "decoder.block"]


def test_a_list_that_counts_from_1_asks_for_no_entry_after_the_last_layers(tmp_path: Path) -> None:
    """Its two convolutions before the encoder take the config and the numbers 1 and 2."""
    config = hf.NemotronAsrStreamingEncoderConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        subsampling_conv_channels=8,
        num_mel_bins=16,
    )
    model: Any = hf.NemotronAsrStreamingEncoder(config).eval()
    with layers_listed(model):
        entries = entries_of(config)
        entries[0]["intermediate_size"] = 40
        set_entries(config, entries)
        for part in (model.layers[0].feed_forward1, model.layers[0].feed_forward2):
            part.linear1 = torch.nn.Linear(32, 40)
            part.linear2 = torch.nn.Linear(40, 32)
    assert layer_lists(type(model)) == ("subsampling.layers", "layers")
    inputs = {"input_features": torch.randn(1, 40, 16)}
    model.save_pretrained(tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


def test_an_audio_codec_is_not_saved_as_a_tokenizer(tmp_path: Path) -> None:
    """custom_object_save writes two names for every class with "Tokenizer" in its name."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = hf.PocketTTSAudioTokenizerConfig(
        **sizes, num_key_value_heads=2, num_hidden_layers=2, head_dim=8
    )
    model: Any = hf.PocketTTSAudioTokenizerEncoderModel(config)
    with layers_listed(model):
        first, last = ({**entries_of(model.config)[n]} for n in range(2))
        set_entries(model.config, {0: first, 1: {**last, "intermediate_size": 24}})
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == {
        "AutoModel": "modeling_layerwise_pocket_tts_audio_tokenizer."
        "LayerwisePocketTTSAudioCodecEncoderModel"
    }


def test_save_pretrained_takes_a_name_for_a_tokenizers() -> None:
    """When this fails, upstream has mended it, and ``layer_class._name`` need not rename."""
    assert 'if "Tokenizer" in full_name:' in inspect.getsource(custom_object_save)
