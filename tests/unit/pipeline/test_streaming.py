"""Weights in mapped files, which the system pages: the bytes of pruning in memory, without it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import model_folders as folders
import paged_child
import pytest
import torch
import transformers as hf
import zoo
from planned import cuts_of
from safetensors.torch import load_file, save_file

from tp_hf_config import UnsupportedModelError, apply_cuts
from tp_hf_config.errors import PipelineError, TPHFConfigError
from tp_hf_config.model import paging
from tp_hf_config.pipeline import output, prune, source
from tp_hf_config.pipeline.job import Job, Pruned
from tp_hf_config.pipeline.output import save_model
from tp_hf_config.pipeline.source import Source

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]
_FORMAT = {"format": "pt"}
OTHERS = ("llama", "gpt2", "convnext", "qwen2_vl")
CLASSES = (
    *("phi3", "mixtral", "gpt_oss", "t5"),  # fused, stacked on loading, stacked, tied
    *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS),
)


@pytest.fixture
def in_files() -> Iterator[list[Any]]:
    """Grows with every tensor that is put into a file; small ones are too."""
    made: list[Any] = []
    make = paging.tempfile.mkstemp

    def noted(**options: Any) -> Any:
        made.append(options)
        return make(**options)

    # no experiment computes with it, so that nothing has to be learned again
    with patch.object(paging, "_SMALLEST", 1), patch.object(paging.tempfile, "mkstemp", noted):
        yield made


def saved(name: str, folder: Path, **options: Any) -> Path:
    zoo.build(name).save_pretrained(folder, **options)
    return folder


def job(folder: Path, out: Path, **settings: Any) -> Job:
    source = Source(str(folder), str(folder))
    settings = {"importance": "magnitude", "refit": False, "stream": True, **settings}
    return Job(source, out, settings.pop("widths", {"pruning_ratio": 0.25}), **settings)


def both_ways(folder: Path, tmp_path: Path, **settings: Any) -> tuple[Pruned, Pruned]:
    """Prune a folder with its weights in files, and in memory."""
    streamed, whole = (
        prune.prune_checkpoint(job(folder, tmp_path / name, stream=stream, **settings))
        for name, stream in (("streamed", True), ("whole", False))
    )
    return streamed, whole


def assert_same_bytes(tmp_path: Path) -> None:
    streamed, whole = (folders.content(tmp_path / name) for name in ("streamed", "whole"))
    assert streamed.keys() == whole.keys()
    assert [name for name in whole if streamed[name] != whole[name]] == []


@pytest.mark.usefixtures("unproved")
class TestTheSameBytes:
    @pytest.mark.parametrize("name", CLASSES)
    def test_of_every_class(self, name: str, tmp_path: Path, in_files: list[Any]) -> None:
        folder = saved(name, tmp_path / "model", max_shard_size="200KB")
        streamed, whole = both_ways(folder, tmp_path)
        assert in_files
        assert streamed.parameters == whole.parameters
        assert streamed.parameters[1] < streamed.parameters[0]
        assert_same_bytes(tmp_path)

    @pytest.mark.parametrize(
        "settings",
        [
            {"importance": "random", "seed": 3, "max_shard_size": "100KB"},
            {"dtype": "bfloat16"},
            {"widths": {"pruning_ratio": 0.5, "iterative_steps": 3}},
            {"widths": {"prune": (), "gqa": "group", "head_pruning_ratio": 0.5}},
        ],
        ids=lambda settings: ",".join(settings),
    )
    @pytest.mark.usefixtures("in_files")
    def test_with_settings(self, settings: dict[str, Any], tmp_path: Path) -> None:
        both_ways(saved("mixtral", tmp_path / "model"), tmp_path, **settings)
        assert_same_bytes(tmp_path)

    @pytest.mark.usefixtures("in_files")
    @pytest.mark.parametrize("name", ["llama-gqa", "mixtral"])
    def test_of_a_model_that_is_run_on_a_text(self, name: str, tmp_path: Path) -> None:
        folders.save_text(tmp_path / "text.txt", words=4_000)
        if name == "mixtral":
            folders.save_tokenizer(saved(name, tmp_path / "model"))
        else:
            folders.save(name, tmp_path / "model")
        streamed, whole = both_ways(
            tmp_path / "model",
            tmp_path,
            importance="wanda",
            refit=True,
            calibration=tmp_path / "text.txt",
            tokens=600,
            widths={"pruning_ratio": 0.25, "iterative_steps": 2},
        )
        assert_same_bytes(tmp_path)
        assert streamed.perplexity == whole.perplexity
        refits = [report.refits for report in streamed.steps]
        assert any(refit is not None and any(one.used for one in refit.layers) for refit in refits)

    @pytest.mark.usefixtures("in_files")
    def test_of_the_file_that_a_config_names(self, tmp_path: Path) -> None:
        """It is not the one that others have their weights in."""
        folder = saved("llama", tmp_path / "model")
        file = folder / "model.safetensors"
        save_file({k: v + 1 for k, v in load_file(file).items()}, folder / "w.safetensors", _FORMAT)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "transformers_weights": "w.safetensors"})
        )
        both_ways(folder, tmp_path, widths={"ratios": {"intermediate_size": 0.25}})
        assert_same_bytes(tmp_path)
        written = load_file(tmp_path / "streamed" / "model.safetensors")
        name = "model.embed_tokens.weight"
        assert torch.equal(written[name], load_file(file)[name] + 1)


@pytest.mark.parametrize("name", ["mixtral", "t5"])
def test_a_fresh_process_reads_it(name: str, tmp_path: Path, in_files: list[Any]) -> None:
    folder = saved(name, tmp_path / "model", max_shard_size="200KB")
    pruned = prune.prune_checkpoint(job(folder, tmp_path / "out", max_shard_size="200KB"))
    assert pruned.proof.numbers > 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert in_files


class TestWhatFails:
    """Nothing is left where the new folder would be, and the model is as it was."""

    def test_a_damaged_file(self, tmp_path: Path) -> None:
        folder = saved("llama", tmp_path / "model")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        self._refused(folder, tmp_path, r"its weights cannot be loaded: SafetensorError")

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system has no fallocate")
    @pytest.mark.usefixtures("in_files")
    def test_a_disk_without_room_for_what_is_cut(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        folder = saved("llama", tmp_path / "model")
        monkeypatch.setattr(os, "posix_fallocate", full)
        self._refused(folder, tmp_path, "a temporary file of .* bytes cannot be written to ")

    @pytest.mark.usefixtures("in_files")
    def test_an_interrupt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = saved("llama", tmp_path / "model")
        before = folders.content(folder)

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(output, "_correct_dtype", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune.prune_checkpoint(job(folder, tmp_path / "out"))
        assert folders.content(folder) == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    @staticmethod
    def _refused(folder: Path, tmp_path: Path, message: str) -> None:
        with pytest.raises(TPHFConfigError, match=message):
            prune.prune_checkpoint(job(folder, tmp_path / "out"))
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_cut_list_is_carried_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_files: list[Any]
) -> None:
    folder = saved(name, tmp_path / "model", max_shard_size="200KB")
    model: Any = zoo.build(name)
    cuts = cuts_of(model)
    cuts.save(tmp_path / "cuts.safetensors")
    monkeypatch.setattr(source, "free_memory", lambda: 1)
    out = apply_cuts(folder, tmp_path / "cuts.safetensors", tmp_path / "streamed")
    assert out == tmp_path / "streamed"
    assert in_files
    save_model(model, tmp_path / "whole")
    assert_same_bytes(tmp_path)
    with pytest.raises(UnsupportedModelError, match="starts from a config with"):
        apply_cuts(out, cuts, tmp_path / "again")
    assert not (tmp_path / "again").exists()


class TestACutListOfOtherTensors:
    @pytest.fixture
    def cuts(self) -> Any:
        return cuts_of(zoo.build("llama"), prune="intermediate_size")

    def edited(self, folder: Path, gone: str | None = None, more: str | None = None) -> Path:
        file = saved("llama", folder) / "model.safetensors"
        tensors = {key: value for key, value in load_file(file).items() if key != gone}
        save_file({**tensors, **({more: torch.ones(2)} if more else {})}, file, {"format": "pt"})
        return folder

    def test_tensors_that_are_missing(self, cuts: Any, tmp_path: Path) -> None:
        """The result would be random there, whoever made the list."""
        folder = self.edited(tmp_path / "model", gone="model.layers.0.mlp.up_proj.weight")
        with pytest.raises(PipelineError) as refused:
            apply_cuts(folder, cuts, tmp_path / "out")
        assert str(refused.value) == (
            f"1 tensors are missing from {folder} and were initialised randomly: "
            "model.layers.0.mlp.up_proj.weight. "
            "The pruned model would contain the random values: add these tensors to the folder "
            "first"
        )
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_tensors_that_are_left_out(self, cuts: Any, tmp_path: Path) -> None:
        folder = self.edited(tmp_path / "model", more="v_head.summary.bias")
        with pytest.warns(UserWarning, match=r"are not used by its class, so the result lacks th"):
            apply_cuts(folder, cuts, tmp_path / "out")


def test_a_model_larger_than_half_of_the_memory_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("llama", tmp_path / "model", max_shard_size="200KB")
    given = job(folder, tmp_path, stream=None)
    assert prune._streams(given) is False
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    monkeypatch.setattr(source, "free_memory", lambda: size)
    assert prune._streams(given) is True
    assert prune._streams(job(folder, tmp_path, stream=False)) is False


SHAPE = {"vocab_size": 99, "hidden_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4}
WIDE: dict[str, tuple[type[hf.PreTrainedModel], Any]] = {
    "llama": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(
            **SHAPE, intermediate_size=1024, num_hidden_layers=16, max_position_embeddings=34
        ),
    ),
    "mixtral": (
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**SHAPE, intermediate_size=768, num_hidden_layers=6, num_local_experts=4),
    ),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says it")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mixtral", {"importance": "magnitude", "refit": False}),
        ("llama", {"importance": "wanda", "tokens": 250}),
    ],
)
@pytest.mark.full
def test_anonymous_memory_does_not_hold_the_model(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Also where experts are stacked on loading, and where a model is measured and refitted."""
    model_class, config = WIDE[name]
    model: Any = model_class(config)
    model.save_pretrained(tmp_path / "model")
    folders.save_tokenizer(tmp_path / "model")
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    free = size // 8
    given = [tmp_path / "model", tmp_path / "out", json.dumps(settings), free]
    done = subprocess.run(
        [sys.executable, paged_child.__file__, *map(str, given)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert int(done.stdout.split()[-1]) < size / 2
    assert (tmp_path / "out" / "model.safetensors").is_file()
