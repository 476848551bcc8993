"""What would fail as the result is written is said before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model_folders as folders
import pytest
import small
from transformers import GenerationConfig

from tp_hf_config.errors import PipelineError
from tp_hf_config.pipeline import deciding, prune
from tp_hf_config.pipeline.job import Job
from tp_hf_config.pipeline.output import check_target
from tp_hf_config.pipeline.source import Source


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

    def test_a_name_that_just_fits(self, tmp_path: Path) -> None:
        check_target(tmp_path / ("a" * 234), overwrite=False)


class TestGenerationConfig:
    """A published one: fields of sampling without do_sample."""

    @pytest.fixture
    def job(self, tmp_path: Path) -> Job:
        folder = folders.save("llama-gqa", tmp_path / "model")
        data = {"temperature": 0.9, "top_p": 0.6}
        (folder / "generation_config.json").write_text(json.dumps(data))
        settings: dict[str, Any] = {"importance": "magnitude", "compensate": False}
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
        monkeypatch.setattr(deciding, "run_steps", None)
        with pytest.raises(PipelineError) as refused:
            prune.prune_checkpoint(job)
        text = str(refused.value)
        start = "LlamaForCausalLM: its generation config (generation_config.json) is one that the "
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
