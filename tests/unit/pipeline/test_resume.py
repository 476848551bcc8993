"""A run from folder to folder is interrupted, and another goes on with it: the same bytes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import model_folders as folders
import pytest
import zoo
from planned import cuts_of
from shell import shell

from tp_hf_config import apply_cuts
from tp_hf_config.checkpoint import lazy_weights
from tp_hf_config.checkpoint.writing import locked, write_whole
from tp_hf_config.errors import CheckpointError, PipelineError
from tp_hf_config.graph import cut_list
from tp_hf_config.pipeline import apply_cuts as cutting
from tp_hf_config.pipeline import checks, deciding, prune, resumable
from tp_hf_config.pipeline.job import Job, Pruned
from tp_hf_config.pipeline.material import Run
from tp_hf_config.pipeline.output import abandoned, new_folder
from tp_hf_config.pipeline.record import record
from tp_hf_config.pipeline.roundtrip import Proof
from tp_hf_config.pipeline.source import Source

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]
KEPT = ".out.resumable"
WIDTHS = {"prune": ("hidden_size", "intermediate_size"), "pruning_ratio": 0.25}
Patch = pytest.MonkeyPatch


def stop(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def at_call(number: int, function: Any, done: bool = False) -> Any:
    """The function, interrupted at its n-th call: before its work, or once it is done."""
    calls: list[Any] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == number and not done:
            stop()
        result = function(*args, **options)
        if len(calls) == number:
            stop()
        return result

    return counted


def half_written(file: Path, write: Callable[[Path], object]) -> None:
    """What a killed process leaves of a file."""
    part = file.with_name(f".{file.name}.part")
    write(part)
    os.truncate(part, part.stat().st_size // 2)


def stopped_within(file: Path, write: Callable[[Path], object]) -> None:
    """An interrupt as the second tensor of a file is read."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lazy_weights, "values_of", at_call(2, lazy_weights.values_of))
        write_whole(file, write)


STAGES: dict[str, tuple[int, Callable[[Patch], None]]] = {
    "the cut list is kept": (
        0,
        lambda p: p.setattr(Run, "perplexities", at_call(2, Run.perplexities)),
    ),
    "within the first file": (
        0,
        lambda p: p.setattr(lazy_weights, "write_whole", stopped_within),
    ),
    "a file is half written": (
        0,
        lambda p: p.setattr(lazy_weights, "write_whole", at_call(1, half_written, done=True)),
    ),
    "between files": (
        2,
        lambda p: p.setattr(lazy_weights, "write_once", at_call(3, lazy_weights.write_once)),
    ),
    "before the index": (
        4,
        lambda p: p.setattr(lazy_weights, "write_once", at_call(4, lazy_weights.write_once, True)),
    ),
    "before the other files": (4, lambda p: p.setattr(prune, "copy_companions", stop)),
    "before the proof": (4, lambda p: p.setattr(prune, "prove_roundtrip", stop)),
    "before the card": (4, lambda p: p.setattr(prune, "card", stop)),
    "before the rename": (4, lambda p: p.setattr(resumable, "put_in_place", stop)),
}
"""Stage -> how many weight files are finished by then, and what interrupts it."""


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def job(folder: Path, out: Path, **settings: Any) -> Job:
    settings = {
        "importance": "magnitude",
        "compensate": False,
        "max_shard_size": "60KB",
        "widths": WIDTHS,
        "resume": True,
        **settings,
    }
    return Job(Source("model", str(folder)), out, **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = folders.save("llama-gqa", tmp_path / "model")
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """A run that was not interrupted."""
    place = tmp_path_factory.mktemp("whole")
    folder = folders.save("llama-gqa", place / "model")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prune, "prove_roundtrip", lambda *_: Proof(1, 2))
        return prune.prune_checkpoint(job(folder, place / "out", resume=False))


def interrupted(job: Job, stage: str, monkeypatch: Patch) -> Job:
    """A job that was interrupted at this stage."""
    with monkeypatch.context() as patched:
        STAGES[stage][1](patched)
        with pytest.raises(KeyboardInterrupt):
            prune.prune_checkpoint(job)
    return job


@pytest.fixture
def kept(folder: Path, tmp_path: Path, monkeypatch: Patch) -> Job:
    """The job of a run that was interrupted with two weight files finished."""
    return interrupted(job(folder, tmp_path / "out"), "between files", monkeypatch)


def assert_same_result(went_on: Pruned, at_once: Pruned) -> None:
    """Folder, card and report are those of the run that was not interrupted."""
    assert folders.content(went_on.out) == folders.content(at_once.out)
    one, other = went_on.to_dict(), at_once.to_dict()
    for result in (one, other):
        for step in (result, *result["steps"], *filter(None, [result["dropped_layers"]])):
            step.pop("seconds", None)
            step.pop("out", None)
            if step.get("compensation"):
                step["compensation"].pop("seconds")
    assert one == other


@pytest.mark.usefixtures("unproved")
class TestTheSameBytes:
    @pytest.mark.parametrize("stage", STAGES)
    def test_after_an_interrupt(
        self, stage: str, at_once: Pruned, tmp_path: Path, monkeypatch: Patch
    ) -> None:
        finished, _ = STAGES[stage]
        assert len(shards(at_once.out)) == 4
        again = job(at_once.out.with_name("model"), tmp_path / "out")
        interrupted(again, stage, monkeypatch)
        assert os.listdir(tmp_path) == [KEPT]
        assert len(shards(tmp_path / KEPT / "model")) == finished
        written = []
        write = lazy_weights.write_safetensors
        monkeypatch.setattr(
            lazy_weights, "write_safetensors", lambda *a: (written.append(a[1]), write(*a))
        )
        monkeypatch.setattr(deciding, "run_steps", None)
        assert_same_result(prune.prune_checkpoint(again), at_once)
        assert len(written) == 4 - finished
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize(
        ("settings", "stage"),
        [
            ({"importance": "wanda", "compensate": True}, "the cut list is kept"),
            (
                {"importance": "random", "widths": {"pruning_ratio": 0.5, "iterative_steps": 2}},
                "between files",
            ),
            (
                {"importance": "wanda", "drop_layers": 1, "widths": {"target_params": 0.4}},
                "the cut list is kept",
            ),
            ({"importance": "wanda", "drop_layers": 1, "widths": {}}, "between files"),
            (
                {"importance": "wanda", "allocate": True, "compensate": True}
                | {"widths": {"target_params": 0.8, "layers": "differ"}},
                "between files",
            ),
            ({"dtype": "bfloat16"}, "between files"),
        ],
        ids=["refits", "random", "layers and widths", "layers", "allocated", "dtype"],
    )
    def test_of_every_kind_of_job(
        self,
        settings: dict[str, Any],
        stage: str,
        folder: Path,
        tmp_path: Path,
        monkeypatch: Patch,
    ) -> None:
        if settings.get("importance") == "wanda":
            text = folders.save_text(tmp_path / "text.txt", words=2_000)
            settings = {**settings, "calibration": text}
        settings = {**settings, "max_shard_size": "20KB"}
        (tmp_path / "whole").mkdir()
        at_once = prune.prune_checkpoint(job(folder, tmp_path / "whole" / "out", **settings))
        again = interrupted(job(folder, tmp_path / "out", **settings), stage, monkeypatch)
        monkeypatch.setattr(deciding, "run_steps", None)
        assert_same_result(prune.prune_checkpoint(again), at_once)


class TestWhatIsLeft:
    def test_nothing_without_resume(self, folder: Path, tmp_path: Path, monkeypatch: Patch) -> None:
        monkeypatch.setattr(prune, "copy_companions", stop)
        with pytest.raises(KeyboardInterrupt):
            prune.prune_checkpoint(job(folder, tmp_path / "out", resume=False))
        assert os.listdir(tmp_path) == ["model"]

    @pytest.mark.parametrize(
        ("place", "name"), [(deciding, "run_steps"), (cut_list, "write_safetensors")]
    )
    def test_nothing_where_nothing_was_decided(
        self, place: Any, name: str, folder: Path, tmp_path: Path, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(place, name, stop)
        with pytest.raises(KeyboardInterrupt):
            prune.prune_checkpoint(job(folder, tmp_path / "out"))
        assert os.listdir(tmp_path) == ["model"]

    @pytest.mark.usefixtures("unproved")
    def test_what_a_killed_run_left_without_deciding_is_taken_over(
        self, folder: Path, tmp_path: Path
    ) -> None:
        (tmp_path / KEPT / "model").mkdir(parents=True)
        (tmp_path / KEPT / "job.json").write_text("{}")
        (tmp_path / KEPT / ".cuts.safetensors.part").write_bytes(b"half")
        prune.prune_checkpoint(job(folder, tmp_path / "out", resume=False))
        assert sorted(os.listdir(tmp_path)) == ["model", "out"]

    @pytest.mark.usefixtures("unproved")
    def test_a_full_disk(self, folder: Path, tmp_path: Path, monkeypatch: Patch) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(lazy_weights, "write_safetensors", full)
            with pytest.raises(PipelineError, match=r"cannot be written: .*No space left"):
                prune.prune_checkpoint(job(folder, tmp_path / "out"))
        assert sorted(os.listdir(tmp_path)) == [KEPT, "model"]
        monkeypatch.setattr(deciding, "run_steps", None)
        prune.prune_checkpoint(job(folder, tmp_path / "out"))
        assert sorted(os.listdir(tmp_path)) == ["model", "out"]

    def test_a_folder_of_a_run_that_was_killed_is_named(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        for name in (".out.0123abcd.unfinished", ".out.0123abcd.old", ".out.b.resumable"):
            (tmp_path / name).mkdir()
        with new_folder(out, overwrite=False) as work:
            assert len(list(tmp_path.glob(".out.*.unfinished"))) == 2
            assert abandoned(out) == [
                "left by a run that was killed, remove it: rm -r "
                f"{tmp_path}/.out.0123abcd.unfinished",
                "left by a run that was killed, the model that it was replacing: "
                f"{tmp_path}/.out.0123abcd.old",
            ]
            assert work.is_dir()


class TestRoomOnTheDisk:
    """What an interrupted run has written of the result needs no room again."""

    def free(self, size: int, monkeypatch: Patch) -> None:
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=size))

    @pytest.mark.usefixtures("unproved")
    def test_it_counts_as_free(self, kept: Job, at_once: Pruned, monkeypatch: Patch) -> None:
        assert at_once.plan is not None
        assert at_once.plan.after is not None
        model = kept.out.with_name(KEPT) / "model"
        written = sum(path.stat().st_size for path in model.iterdir())
        needed = at_once.plan.after.bytes - written
        assert 0 < needed < at_once.plan.after.bytes
        self.free(needed - 1, monkeypatch)
        with pytest.raises(
            PipelineError, match=r"the pruned model takes [\d,]+ bytes, and [\d,]+ a"
        ):
            prune.prune_checkpoint(kept)
        assert len(shards(model)) == 2
        self.free(needed, monkeypatch)
        assert prune.prune_checkpoint(kept).parameters == at_once.parameters

    def test_nothing_is_there_at_first(
        self, folder: Path, tmp_path: Path, at_once: Pruned, monkeypatch: Patch
    ) -> None:
        assert at_once.plan is not None
        assert at_once.plan.after is not None
        self.free(at_once.plan.after.bytes - 1, monkeypatch)
        with pytest.raises(PipelineError, match="the pruned model takes"):
            prune.prune_checkpoint(job(folder, tmp_path / "out"))


class TestRefused:
    def test_a_run_without_resume(self, kept: Job) -> None:
        with pytest.raises(PipelineError) as refused:
            prune.prune_checkpoint(replace(kept, resume=False))
        folder = kept.out.with_name(KEPT)
        assert str(refused.value) == (
            f"{kept.out}: a run that was interrupted has decided what to cut, and keeps it in "
            f"{folder}. Add resume=True to go on with it. To start anew, first: rm -r "
            f"{folder}"
        )
        assert len(shards(folder / "model")) == 2

    @pytest.mark.parametrize(
        ("settings", "what"),
        [
            ({"seed": 3}, "settings seed was 0, is 3"),
            (
                {"widths": {**WIDTHS, "pruning_ratio": 0.5}},
                "settings widths pruning_ratio was 0.25, is 0.5",
            ),
            ({"max_shard_size": "1GB"}, 'settings max_shard_size was "60KB", is "1GB"'),
        ],
    )
    def test_other_settings(self, kept: Job, settings: dict[str, Any], what: str) -> None:
        self.refused(replace(kept, **settings), what)

    def test_another_text(self, folder: Path, tmp_path: Path, monkeypatch: Patch) -> None:
        text = folders.save_text(tmp_path / "text.txt", words=2_000)
        again = job(folder, tmp_path / "out", importance="wanda", calibration=text)
        interrupted(again, "the cut list is kept", monkeypatch)
        folders.save_text(tmp_path / "text.txt", words=2_001)
        self.refused(again, "settings calibration text was ")

    @pytest.mark.parametrize(
        "name", ["config.json", "model.safetensors", "tokenizer.json", "README.md"]
    )
    def test_another_source(self, kept: Job, folder: Path, name: str) -> None:
        path = folder / name
        if name == "model.safetensors":
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        elif name == "README.md":
            path.write_text("new")
        else:
            path.write_bytes(path.read_bytes() + b"\n")
        self.refused(kept, f"source files {name} was ")

    def test_another_code(self, folder: Path, tmp_path: Path, monkeypatch: Patch) -> None:
        """Code that is not trusted does not run, so it decides nothing."""
        (folder / "modeling_own.py").write_text("")
        again = job(folder, tmp_path / "out")
        again = replace(again, source=replace(again.source, trust_remote_code=True))
        interrupted(again, "between files", monkeypatch)
        (folder / "modeling_own.py").write_text("changed = True")
        self.refused(again, "source files modeling_own.py was ")
        assert "modeling_own.py" not in record(job(folder, tmp_path).source, {})["source"]["files"]

    def test_another_version(self, kept: Job, monkeypatch: Patch) -> None:
        from tp_hf_config.pipeline import record

        monkeypatch.setattr(record, "versions", lambda: {"torch": "9.9"})
        self.refused(kept, "versions tp-hf-config was ")

    @staticmethod
    def refused(again: Job, what: str) -> None:
        folder = again.out.with_name(KEPT)
        before = folders.content(folder)
        with pytest.raises(PipelineError) as refused:
            prune.prune_checkpoint(again)
        start = (
            "resume=True: the interrupted run had other settings, another source or other versions"
        )
        assert str(refused.value).startswith(f"{start}: {what}")
        assert str(refused.value).endswith(f"To start anew, first: rm -r {folder}")
        assert folders.content(folder) == before

    @pytest.mark.parametrize("name", ["decided.pt", "cuts.safetensors", "job.json"])
    def test_what_is_damaged(self, kept: Job, name: str) -> None:
        path = kept.out.with_name(KEPT) / name
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(PipelineError, match=r"cannot be read: .* first: rm -r .*resumable"):
            prune.prune_checkpoint(kept)
        assert not kept.out.exists()

    def test_a_damaged_weight_file_is_not_proved(self, kept: Job) -> None:
        path = kept.out.with_name(KEPT) / "model" / "model-00001-of-00004.safetensors"
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start:] = bytes(len(data) - start)
        path.write_bytes(data)
        with pytest.raises(PipelineError, match="round trip is not proved"):
            prune.prune_checkpoint(kept)
        assert not kept.out.exists()

    def test_what_another_process_writes(self, kept: Job) -> None:
        with locked(kept.out.with_name(KEPT)):
            for resume in (True, False):
                with pytest.raises(CheckpointError, match="is being written by another process"):
                    prune.prune_checkpoint(replace(kept, resume=resume))

    def test_a_folder_that_is_something_else(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / KEPT).mkdir()
        (tmp_path / KEPT / "thesis.txt").write_text("mine")
        with pytest.raises(PipelineError, match=r"found thesis\.txt\. Move it away"):
            prune.prune_checkpoint(job(folder, tmp_path / "out"))
        assert (tmp_path / KEPT / "thesis.txt").read_text() == "mine"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"recover": 3}, "--resume: --recover trains the model"),
            ({"importance": "taylor"}, "--resume: --importance taylor trains the model"),
            ({"device": "meta"}, "--resume: weights are read to the CPU"),
        ],
    )
    def test_what_needs_the_weights_in_memory(
        self, folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
    ) -> None:
        text = folders.save_text(tmp_path / "text.txt", words=2_000)
        with pytest.raises(PipelineError, match=message):
            prune.prune_checkpoint(job(folder, tmp_path / "out", calibration=text, **settings))


class TestFromTheShell:
    def typed(self, folder: Path, out: Path) -> tuple[object, ...]:
        importance = ("--importance", "magnitude", "--no-compensate")
        return ("prune", folder, "--out", out, "--pruning-ratio", "0.25", *importance)

    @pytest.mark.usefixtures("unproved")
    def test_ctrl_c_says_what_to_type(
        self, capsys: Any, folder: Path, tmp_path: Path, monkeypatch: Patch
    ) -> None:
        def ctrl_c(*_: Any, **__: Any) -> None:
            signal.raise_signal(signal.SIGINT)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        typed = self.typed(folder, tmp_path / "out")
        with monkeypatch.context() as patched:
            patched.setattr(prune, "copy_companions", ctrl_c)
            code, _, errors = shell(capsys, *typed, "--resume")
        signal.signal(signal.SIGINT, before)
        command = f"tp-hf-config {' '.join(map(str, typed))}"
        assert code == 130
        assert errors.splitlines()[-2:] == [
            f"what is done is kept in {tmp_path / KEPT}. To go on: {command} --resume",
            "tp-hf-config prune: interrupted",
        ]
        code, _, errors = shell(capsys, *typed)
        assert code == 2
        assert "Add --resume to go on with it" in errors
        assert shell(capsys, *typed, "--resume")[0] == 0
        assert f"`{command}`" in (tmp_path / "out" / "README.md").read_text()

    def test_a_contradiction(self, capsys: Any, folder: Path, tmp_path: Path) -> None:
        typed = (*self.typed(folder, tmp_path / "out"), "--resume", "--no-stream")
        code, _, errors = shell(capsys, *typed)
        assert code == 2
        assert "--resume goes on from folder to folder: leave --no-stream out" in errors

    def test_a_killed_process(
        self, capsys: Any, folder: Path, tmp_path: Path, monkeypatch: Patch
    ) -> None:
        """SIGKILL in the middle of the third file, of a run that nobody asked to keep anything."""
        (tmp_path / "whole").mkdir()
        options = ("--max-shard-size", "60KB")
        assert shell(capsys, *self.typed(folder, tmp_path / "whole" / "out"), *options)[0] == 0
        code = f"""if True:
            import os, signal, sys
            import torch
            from tp_hf_config.checkpoint import lazy_weights
            from tp_hf_config.cli.main import main
            torch.set_num_threads(1)
            read, files = lazy_weights.values_of, []
            write = lazy_weights.write_safetensors
            def note(tensors, path, metadata=None):
                files.extend([path] if path.name.startswith(".model-") else [])
                write(tensors, path, metadata)
            def values_of(tensor):
                if len(files) == 3 and os.path.getsize(files[-1]) > 4000:
                    os.kill(os.getpid(), signal.SIGKILL)
                return read(tensor)
            lazy_weights.write_safetensors, lazy_weights.values_of = note, values_of
            main({[str(word) for word in (*self.typed(folder, tmp_path / "out"), *options)]!r})
        """
        killed = subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert sorted(os.listdir(tmp_path)) == [KEPT, "model", "whole"]
        files = os.listdir(tmp_path / KEPT / "model")
        assert len([name for name in files if name.endswith(".safetensors")]) == 2
        assert len([name for name in files if name.endswith(".part")]) == 1
        monkeypatch.setattr(deciding, "run_steps", None)
        typed = (*self.typed(folder, tmp_path / "out"), *options, "--resume")
        code, _, errors = shell(capsys, *typed)
        assert (code, "going on: what goes is decided" in errors) == (0, True)
        went_on, at_once = (
            folders.content(place / "out") for place in (tmp_path, tmp_path / "whole")
        )
        del went_on["README.md"], at_once["README.md"]  # with the command
        assert went_on == at_once


class TestApplyCuts:
    @pytest.fixture
    def cuts(self) -> Any:
        return cuts_of(zoo.build("llama"))

    def test_goes_on(self, cuts: Any, tmp_path: Path, monkeypatch: Patch) -> None:
        folder, out = tmp_path / "model", tmp_path / "out"
        zoo.build("llama").save_pretrained(folder)
        cuts.save(tmp_path / "cuts.safetensors")
        apply_cuts(folder, cuts, tmp_path / "whole", max_shard_size="60KB")
        with monkeypatch.context() as patched:
            patched.setattr(cutting, "copy_companions", stop)
            with pytest.raises(KeyboardInterrupt):
                apply_cuts(folder, cuts, out, max_shard_size="60KB", resume=True)
        with pytest.raises(PipelineError, match="settings max_shard_size was"):
            apply_cuts(folder, cuts, out, resume=True)
        with pytest.raises(PipelineError, match="Add resume=True to go on"):
            apply_cuts(folder, cuts, out, max_shard_size="60KB")
        monkeypatch.setattr(lazy_weights, "write_safetensors", None)
        saved = tmp_path / "cuts.safetensors"
        apply_cuts(folder, saved, out, max_shard_size="60KB", resume=True)
        assert folders.content(out) == folders.content(tmp_path / "whole")
        assert not (tmp_path / KEPT).exists()

    def test_digests_tell_cut_lists_apart(self, cuts: Any, tmp_path: Path) -> None:
        cuts.save(tmp_path / "cuts.safetensors")
        assert type(cuts).load(tmp_path / "cuts.safetensors").digest() == cuts.digest()
        name, (edit, *_) = next(iter(cuts.edits.items()))
        other = replace(edit, positions={d: p.flip(0) for d, p in edit.positions.items()})
        assert replace(cuts, edits={**cuts.edits, name: (other,)}).digest() != cuts.digest()
