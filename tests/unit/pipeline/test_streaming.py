"""From folder to folder, tensor by tensor: the same bytes as with the model in memory."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import model_folders as folders
import pytest
import torch
import zoo
from planned import cuts_of
from safetensors.torch import load_file, save_file

from tp_hf_config import UnsupportedModelError, apply_cuts
from tp_hf_config.checkpoint import lazy_weights, loading
from tp_hf_config.errors import PipelineError, TPHFConfigError
from tp_hf_config.model.lazy_tensor import LazyTensor
from tp_hf_config.pipeline import prune, streaming
from tp_hf_config.pipeline.choice import Choice
from tp_hf_config.pipeline.job import Job, Pruned
from tp_hf_config.pipeline.output import save_model
from tp_hf_config.pipeline.source import Source

pytestmark = pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning")
_FORMAT = {"format": "pt"}
CLASSES = ("llama", "phi3", "gpt2", "mixtral", "gpt_oss", "t5", "convnext", "qwen2_vl")


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the size of every tensor that is read by itself from a model's files."""
    sizes: list[int] = []
    original = lazy_weights._read

    def read(path: Path, stored: Any) -> torch.Tensor:
        if not path.parent.name.startswith("tp_hf_config-"):
            sizes.append(stored.bytes)
        return original(path, stored)

    monkeypatch.setattr(lazy_weights, "_read", read)
    return sizes


def saved(name: str, folder: Path, **options: Any) -> Path:
    zoo.build(name).save_pretrained(folder, **options)
    return folder


def job(folder: Path, out: Path, **settings: Any) -> Job:
    source = Source(str(folder), str(folder))
    settings = {"importance": "magnitude", "compensate": False, **settings}
    return Job(source, out, settings.pop("widths", {"pruning_ratio": 0.25}), **settings)


def both_ways(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Pruned, Pruned]:
    """Prune a folder as a stream, and in memory."""
    streamed = prune.prune_checkpoint(job(folder, tmp_path / "streamed", **settings))
    monkeypatch.setattr(prune, "streams", lambda *_: False)
    return streamed, prune.prune_checkpoint(job(folder, tmp_path / "whole", **settings))


def assert_same_bytes(tmp_path: Path) -> None:
    streamed, whole = (folders.content(tmp_path / name) for name in ("streamed", "whole"))
    assert streamed.keys() == whole.keys()
    assert [name for name in whole if streamed[name] != whole[name]] == []


@pytest.mark.usefixtures("unproved")
class TestTheSameBytes:
    @pytest.mark.parametrize("name", CLASSES)
    def test_of_every_class(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: list[int]
    ) -> None:
        folder = saved(name, tmp_path / "model", max_shard_size="200KB")
        streamed, whole = both_ways(folder, tmp_path, monkeypatch)
        assert read_bytes
        assert streamed.parameters == whole.parameters
        assert streamed.parameters[1] < streamed.parameters[0]
        assert_same_bytes(tmp_path)

    @pytest.mark.parametrize(
        "settings",
        [
            {"importance": "random", "seed": 3},
            {"dtype": "bfloat16"},
            {"max_shard_size": "100KB"},
            {"widths": {"pruning_ratio": 0.5, "iterative_steps": 3}},
            {"widths": {"prune": (), "gqa": "group", "head_pruning_ratio": 0.5}},
        ],
        ids=lambda settings: ",".join(settings),
    )
    @pytest.mark.parametrize("name", ["llama", "mixtral"])
    def test_with_settings(
        self, name: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = saved(name, tmp_path / "model")
        both_ways(folder, tmp_path, monkeypatch, **settings)
        assert_same_bytes(tmp_path)


def test_a_fresh_process_reads_it(tmp_path: Path, read_bytes: list[int]) -> None:
    folder = saved("mixtral", tmp_path / "model", max_shard_size="200KB")
    pruned = prune.prune_checkpoint(job(folder, tmp_path / "out", max_shard_size="200KB"))
    assert pruned.proof.numbers > 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert read_bytes


class TestWhatFails:
    """Nothing is left where the new folder would be, and the model is as it was."""

    def test_a_damaged_file(self, tmp_path: Path) -> None:
        folder = saved("llama", tmp_path / "model")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        self._refused(folder, tmp_path, r"it is cut off: \S+ ends at byte")

    def test_a_file_that_is_cut_off_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = saved("llama", tmp_path / "model")
        file, loaded = folder / "model.safetensors", prune.load_lazily

        def load(*args: Any, **options: Any) -> Any:
            result = loaded(*args, **options)
            file.write_bytes(file.read_bytes()[:-100])
            return result

        monkeypatch.setattr(prune, "load_lazily", load)
        self._refused(folder, tmp_path, "model.safetensors is cut off: 100 bytes are missing")

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = saved("llama", tmp_path / "model")

        def write(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(lazy_weights, "write_safetensors", write)
        self._refused(folder, tmp_path, "cannot be written: .*No space left on device")

    def test_an_interrupt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = saved("llama", tmp_path / "model")
        before, values_of = folders.content(folder), lazy_weights.values_of
        written = []

        def values(tensor: LazyTensor) -> torch.Tensor:
            written.append(tensor)
            if len(written) > 5:
                raise KeyboardInterrupt
            return values_of(tensor)

        monkeypatch.setattr(lazy_weights, "values_of", values)
        with pytest.raises(KeyboardInterrupt):
            prune.prune_checkpoint(job(folder, tmp_path / "out"))
        assert folders.content(folder) == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    @staticmethod
    def _refused(folder: Path, tmp_path: Path, message: str) -> None:
        with pytest.raises(TPHFConfigError, match=message):
            prune.prune_checkpoint(job(folder, tmp_path / "out"))
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("unproved")
def test_weights_that_are_no_safetensors_are_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("llama", tmp_path / "model")
    state = zoo.build("llama").state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    monkeypatch.setattr(prune, "load_lazily", None)
    assert prune.prune_checkpoint(job(folder, tmp_path / "out")).parameters[1] > 0
    with pytest.raises(PipelineError, match="is not empty"):
        prune.prune_checkpoint(job(folder, tmp_path / "out"))


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_cut_list_is_carried_out(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "model", max_shard_size="200KB")
    model: Any = zoo.build(name)
    cuts = cuts_of(model)
    cuts.save(tmp_path / "cuts.safetensors")
    out = apply_cuts(folder, tmp_path / "cuts.safetensors", tmp_path / "streamed")
    assert out == tmp_path / "streamed"
    save_model(model, tmp_path / "whole")
    assert_same_bytes(tmp_path)
    with pytest.raises(UnsupportedModelError, match="starts from a config with"):
        apply_cuts(out, cuts, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.usefixtures("unproved")
def test_the_file_that_a_config_names_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not the one that others have their weights in."""
    folder = saved("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, folder / "w.safetensors", _FORMAT)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "w.safetensors"})
    )
    both_ways(folder, tmp_path, monkeypatch, widths={"ratios": {"intermediate_size": 0.25}})
    assert_same_bytes(tmp_path)
    written = load_file(tmp_path / "streamed" / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(written[name], load_file(file)[name] + 1)


@pytest.mark.usefixtures("unproved")
def test_weights_in_a_folder_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", tmp_path / "model", max_shard_size="200KB")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    (folder / "parts").mkdir()
    for file in set(data["weight_map"].values()):
        (folder / file).rename(folder / "parts" / file)
    inside = {name: f"parts/{file}" for name, file in data["weight_map"].items()}
    index.write_text(json.dumps({**data, "weight_map": inside}))
    both_ways(folder, tmp_path, monkeypatch)
    assert_same_bytes(tmp_path)


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
            f"1 tensors are not in {folder} and are random: model.layers.0.mlp.up_proj.weight. "
            "The result would have them: add them to the folder first"
        )
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_tensors_that_are_left_out(self, cuts: Any, tmp_path: Path) -> None:
        folder = self.edited(tmp_path / "model", more="v_head.summary.bias")
        with pytest.warns(UserWarning, match=r"are not read by its class, so the result lacks th"):
            apply_cuts(folder, cuts, tmp_path / "out")

    def test_an_older_transformers(
        self, cuts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = saved("llama", tmp_path / "model")
        monkeypatch.setattr(loading, "MAJOR", 4)
        with pytest.raises(PipelineError, match=r"model: it takes Transformers 5$"):
            apply_cuts(folder, cuts, tmp_path / "out")


class TestRunOnAText:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folders.save_text(tmp_path / "text.txt", words=4_000)
        return folders.save("llama-gqa", tmp_path / "model")

    @pytest.mark.usefixtures("unproved")
    def test_the_same_bytes_as_in_memory(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = {"importance": "wanda", "compensate": True, "stream": True}
        settings["calibration"] = tmp_path / "text.txt"
        streamed, whole = both_ways(folder, tmp_path, monkeypatch, **settings)
        assert_same_bytes(tmp_path)
        assert streamed.perplexity == whole.perplexity
        (report,) = streamed.reports
        assert report.compensation is not None
        assert any(layer.used for layer in report.compensation.layers)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"recover": 3}, "--stream: --recover trains the model"),
            ({"importance": "taylor"}, "--stream: --importance taylor trains the model"),
            ({"calibration": "own"}, "--stream: a model that writes its own text"),
        ],
    )
    def test_what_needs_the_weights_in_memory_is_refused(
        self, folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
    ) -> None:
        given = {"importance": "wanda", "calibration": tmp_path / "text.txt", **settings}
        with pytest.raises(PipelineError, match=message):
            prune.prune_checkpoint(job(folder, tmp_path / "out", stream=True, **given))
        assert not (tmp_path / "out").exists()
        assert streaming.streams(job(folder, tmp_path, **given), Choice("wanda", "file")) is False

    def test_a_model_larger_than_half_of_the_memory_streams(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given, choice = job(folder, tmp_path, importance="wanda"), Choice("wanda", "file")
        assert streaming.streams(given, choice) is False
        size = (folder / "model.safetensors").stat().st_size
        monkeypatch.setattr(streaming, "free_memory", lambda: size)
        assert streaming.streams(given, choice) is True
        assert streaming.streams(replace(given, stream=False), choice) is False
