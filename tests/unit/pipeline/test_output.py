"""What would fail as the result is written is said before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model_folders as folders
import pytest
import small
import torch
import transformers
import zoo
from transformers import GenerationConfig

from tp_hf_config.checkpoint import folder as folder_module
from tp_hf_config.checkpoint.loading import main_dtype
from tp_hf_config.errors import PipelineError
from tp_hf_config.pipeline import prune
from tp_hf_config.pipeline.job import Job
from tp_hf_config.pipeline.output import check_target, output_folder, save_model
from tp_hf_config.pipeline.source import Source

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]


class TestTarget:
    @pytest.mark.parametrize("name", ["a" * 300, "a" * 250, "a\0b"], ids=["long", "work", "null"])
    def test_a_name_that_no_file_can_have(self, name: str, tmp_path: Path) -> None:
        """Nor the hidden folder beside it, to which is written first."""
        with pytest.raises(PipelineError, match=r": cannot be written: "):
            check_target(tmp_path / name, overwrite=False)

    def test_a_home_that_nobody_has(self) -> None:
        with pytest.raises(PipelineError, match="~nobody-of-this-name/out: cannot be written: "):
            check_target(Path("~nobody-of-this-name/out"), overwrite=False)

    def test_a_folder_that_cannot_be_looked_at(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever runs the tests may look everywhere."""

        def denied(*_: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "iterdir", denied)
        with pytest.raises(PipelineError, match=r": cannot be written: .*Permission denied"):
            check_target(tmp_path, overwrite=True)

    def test_another_disk_is_mounted_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No folder can be renamed to it."""
        monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
        with pytest.raises(PipelineError) as refused:
            check_target(tmp_path, overwrite=False)
        assert str(refused.value) == (
            f"{tmp_path}: another disk is mounted here, so the finished folder cannot be renamed "
            f"to this path. Choose a folder inside: {tmp_path}/pruned"
        )

    def test_a_name_that_just_fits(self, tmp_path: Path) -> None:
        check_target(tmp_path / ("a" * 234), overwrite=False)


class TestFileSystems:
    """What some of them cannot do."""

    def test_flush_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flush = folder_module.flush

        def refused(path: Path) -> None:
            if path.is_dir():
                raise OSError(22, "Invalid argument")
            flush(path)

        monkeypatch.setattr(folder_module, "flush", refused)
        with output_folder(tmp_path / "out", overwrite=False) as work:
            (work / "part").mkdir()
            (work / "part" / "file").write_text("text")
        assert (tmp_path / "out" / "part" / "file").read_text() == "text"


class TestSavedConfig:
    def test_a_class_that_keeps_its_first_weight_in_float32(self, tmp_path: Path) -> None:
        """It is to be loaded with the dtype of the others."""
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        sizes["num_attention_heads"] = 2
        text = {**sizes, "ffn_dim": 32, "vocab_size": 40, "word_embed_proj_dim": 16}
        config = transformers.Blip2Config(
            vision_config={**sizes, "image_size": 8, "patch_size": 4},
            qformer_config={**sizes, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
            text_config={"model_type": "opt", **text, "max_position_embeddings": 64},
            num_query_tokens=4,
            image_token_index=39,
        )
        transformers.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
        model = transformers.Blip2ForConditionalGeneration.from_pretrained(
            tmp_path / "whole", dtype=torch.float16
        )
        assert model.dtype == torch.float32
        assert main_dtype(model) == torch.float16
        assert save_model(model, tmp_path / "half") == ()
        loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            tmp_path / "half", dtype="auto"
        )
        kinds = {name: weight.dtype for name, weight in model.named_parameters()}
        assert {name: weight.dtype for name, weight in loaded.named_parameters()} == kinds

    @pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="an older one writes it by itself")
    def test_rotary_fields_where_transformers_4_looks(self, tmp_path: Path) -> None:
        model = zoo.build("llama")
        assert save_model(model, tmp_path) == ()
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == 10000.0


class TestGenerationConfig:
    """A published one: fields of sampling without do_sample."""

    @pytest.fixture
    def job(self, tmp_path: Path) -> Job:
        folder = folders.save("llama-gqa", tmp_path / "model")
        data = {"temperature": 0.9, "top_p": 0.6}
        (folder / "generation_config.json").write_text(json.dumps(data))
        settings: dict[str, Any] = {"importance": "magnitude", "refit": False}
        source = Source("model", str(folder))
        return Job(source, tmp_path / "out", {"pruning_ratio": 0.25}, **settings)

    def test_a_transformers_that_does_not_save_it(
        self, job: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As 4.57 and 5.0 are; newer ones save what nobody changed."""
        save = GenerationConfig.save_pretrained

        def strict(config: GenerationConfig, *args: Any, **options: Any) -> None:
            config.validate(strict=True)
            save(config, *args, **options)

        monkeypatch.setattr(GenerationConfig, "save_pretrained", strict)
        monkeypatch.setattr(prune, "run_steps", None)
        with pytest.raises(PipelineError) as refused:
            prune.prune_checkpoint(job)
        text = str(refused.value)
        start = "LlamaForCausalLM: the installed Transformers cannot save its generation config. "
        assert text.startswith(start)
        assert "`temperature`" in text
        assert "`top_p`" in text
        assert not job.out.exists()

    @pytest.mark.usefixtures("unproved")
    @pytest.mark.skipif(small.TRANSFORMERS < (5, 24), reason="an older one may refuse it")
    def test_a_transformers_that_saves_it(self, job: Job) -> None:
        prune.prune_checkpoint(job)
        saved = json.loads((job.out / "generation_config.json").read_text())
        assert (saved["temperature"], saved["top_p"]) == (0.9, 0.6)
