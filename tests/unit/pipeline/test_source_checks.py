"""A source of which Transformers would read something else, or a part, is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import model_folders as folders
import pytest
import torch
import transformers as hf

from tp_hf_config.errors import UnsupportedModelError
from tp_hf_config.pipeline.companions import Copied, copy_companions
from tp_hf_config.pipeline.source import (
    Source,
    check_source,
    class_for,
    config_of,
    find_source,
    load,
)


def write(path: Path, seed: int = 0, scaled: bool = False) -> hf.LlamaForCausalLM:
    """Write a GGUF file of a small Llama, and return the Llama."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 4, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 32}
    config = hf.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    model = hf.LlamaForCausalLM(config).eval()
    path.parent.mkdir(exist_ok=True)
    widths = {
        "vocab_size": 32,
        "embedding_length": 4,
        "block_count": 1,
        "feed_forward_length": 48,
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
    }
    writer: Any = gguf.GGUFWriter(path, "llama")
    for name, value in widths.items():
        writer.add_uint32(f"llama.{name}", value)
    if scaled:
        writer.add_tensor("rope_freqs.weight", torch.ones(1).numpy())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for key, values in model.state_dict().items():
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


class TestGGUF:
    def test_a_file_of_the_same_name_in_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Transformers looks there first."""
        write(tmp_path / "here" / "model.gguf", seed=1)
        wanted = write(tmp_path / "there" / "model.gguf", seed=2)
        monkeypatch.chdir(tmp_path / "here")
        source = find_source("../there/model.gguf")
        config = config_of(source)
        check_source(source, config)
        model, notes = load(source, config, class_for(source, config))
        assert notes == ()
        assert torch.equal(model.model.embed_tokens.weight, wanted.model.embed_tokens.weight)

    def test_scaled_rotary_embeddings(self, tmp_path: Path) -> None:
        """Transformers would read it without its scaling, and say nothing."""
        write(tmp_path / "model.gguf", scaled=True)
        source = find_source(str(tmp_path / "model.gguf"))
        with pytest.raises(UnsupportedModelError) as refused:
            check_source(source, config_of(source))
        assert str(refused.value) == (
            f"{tmp_path}/model.gguf scales its rotary embeddings (rope_freqs.weight), which "
            "Transformers does not read from a GGUF file, so the loaded model would compute other "
            "outputs. Prune the safetensors model that it was made from"
        )

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            (
                {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
                r"\(llama\.rope\.scaling\.type, llama\.rope\.scaling\.factor\)",
            ),
            ({"llama.rope.scaling.type": "none"}, None),
            ({"split.count": 2}, "is one of 2 files of a model, and Transformers would read only"),
            ({"split.count": 1}, None),
        ],
        ids=["linear", "none", "split", "whole"],
    )
    def test_fields(
        self,
        fields: dict[str, Any],
        reason: str | None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        write_header = gguf.GGUFWriter.write_header_to_file

        def with_fields(writer: Any) -> None:
            for name, value in fields.items():
                kinds = {str: writer.add_string, int: writer.add_uint16, float: writer.add_float32}
                kinds[type(value)](name, value)
            write_header(writer)

        monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_fields)
        write(tmp_path / "model.gguf")
        source = find_source(str(tmp_path / "model.gguf"))
        if reason is None:
            check_source(source, config_of(source))
        else:
            with pytest.raises(UnsupportedModelError, match=reason):
                check_source(source, config_of(source))

    def test_a_tokenizer_that_cannot_be_read(self, tmp_path: Path) -> None:
        """The model is pruned without one, as a folder without a tokenizer is."""
        write(tmp_path / "model.gguf")
        (tmp_path / "out").mkdir()
        copied = copy_companions(find_source(str(tmp_path / "model.gguf")), tmp_path / "out")
        assert (copied.files, copied.not_copied) == ((), ())
        (note,) = copied.notes
        assert note.startswith("the result has no tokenizer: ")
        assert "its tokenizer cannot be loaded: " in note
        assert copy_companions(Source("m", str(tmp_path / "out")), tmp_path / "out") == Copied(())


class TestFolders:
    @pytest.mark.parametrize("part", ["", "text_config"])
    def test_quantised_weights_of_a_model_or_a_part(self, part: str) -> None:
        config = hf.Qwen2VLConfig()
        (getattr(config, part) if part else config).quantization_config = {"quant_method": "fp8"}
        with pytest.raises(UnsupportedModelError, match=r"^model is quantised \(fp8\): packed wei"):
            check_source(Source("model", "model"), config)

    def test_an_adapter_beside_the_weights(self, tmp_path: Path) -> None:
        """Where peft is installed, ``from_pretrained`` adds it."""
        folder = folders.save("llama-gqa", tmp_path / "model")
        source = find_source(str(folder))
        check_source(source, config_of(source))
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(UnsupportedModelError, match=r"holds an adapter \(adapter_config\.json"):
            check_source(source, hf.AutoConfig.from_pretrained(folder))
