"""Which class a folder's model is of, and what is said of tensors that do not fit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model_folders as folders
import pytest
import torch
import transformers as hf
import zoo
from safetensors.torch import load_file, save_file

from tp_hf_config.errors import PipelineError, UnsupportedModelError
from tp_hf_config.pipeline.source import Source, class_for, config_of, load


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of config.json; ``None`` removes one."""
    data = {**json.loads((folder / "config.json").read_text()), **fields}
    data = {key: value for key, value in data.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(data))


class TestClass:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        cache = str(tmp_path / "cache")
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        monkeypatch.setenv("HF_MODULES_CACHE", cache)
        zoo.build("llama").save_pretrained(tmp_path / "model")
        return folders.with_code(tmp_path / "model", tmp_path / "ran")

    @pytest.mark.parametrize("architectures", [["Own"], None])
    def test_code_of_the_model_with_and_without_architectures(
        self, architectures: list[str] | None, folder: Path, tmp_path: Path
    ) -> None:
        edit(folder, architectures=architectures)
        source = Source("model", str(folder))
        with pytest.raises(PipelineError, match=r"modeling_own\.Own is code that comes with the m"):
            class_for(source, config_of(source))
        assert not (tmp_path / "ran").exists()
        trusted = Source("model", str(folder), trust_remote_code=True)
        assert class_for(trusted, config_of(trusted)).__name__ == "Own"

    @pytest.mark.parametrize("trusted", [True, False])
    def test_a_stock_class_that_has_other_code_beside_it(
        self, trusted: bool, folder: Path, tmp_path: Path
    ) -> None:
        own = {"AutoProcessor": "modeling_own.Own"}
        edit(folder, architectures=["LlamaForCausalLM"], auto_map=own)
        source = Source("model", str(folder), trust_remote_code=trusted)
        assert class_for(source, config_of(source)) is hf.LlamaForCausalLM
        assert not (tmp_path / "ran").exists()

    def test_a_class_that_transformers_lacks(self, folder: Path) -> None:
        """Its parts would be lost, and others random."""
        edit(folder, architectures=["LlamaForRewards"], auto_map=None)
        source = Source("model", str(folder))
        with pytest.raises(UnsupportedModelError) as refused:
            class_for(source, config_of(source))
        assert str(refused.value) == (
            "model: Transformers has no class LlamaForRewards, which config.json names "
            "(architectures). Another class would lack some weights or initialise them randomly: "
            "name the class that the weights were saved from"
        )


class TestNotes:
    def noted(self, name: str, folder: Path, more: dict[str, torch.Tensor]) -> tuple[str, ...]:
        """What is said of a model's folder with these tensors beside its own."""
        model = zoo.build(name)
        model.save_pretrained(folder)
        file = folder / "model.safetensors"
        save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
        source = Source("model", str(folder))
        return load(source, config_of(source), type(model))[1]

    def test_tensors_that_the_class_does_not_read(self, tmp_path: Path) -> None:
        head = {f"v_head.summary.{kind}": torch.ones(1, 64) for kind in ("weight", "bias")}
        assert self.noted("llama", tmp_path, head) == (
            "2 tensors of model are not used by its class, so the result lacks them: "
            "v_head.summary.bias, v_head.summary.weight",
        )

    def test_not_those_that_it_says_to_ignore(self, tmp_path: Path) -> None:
        old = {"transformer.h.0.attn.bias": torch.ones(1)}
        assert self.noted("gpt2", tmp_path, old) == ()
