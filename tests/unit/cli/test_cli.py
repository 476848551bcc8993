"""The shell command: help, usage, tables, JSON, exit codes, streams."""

from __future__ import annotations

import ast
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_folders as folders
import pytest
import small
from shell import shell
from transformers import AutoConfig
from typer import BadParameter

import tp_hf_config
from tp_hf_config.cli import main as main_module
from tp_hf_config.cli import values
from tp_hf_config.cli.commands import _few_warnings
from tp_hf_config.cli.main import main
from tp_hf_config.errors import CalibrationWarning, PrunerSettingsWarning
from tp_hf_config.model.build import Refusal
from tp_hf_config.pipeline.job import show, track
from tp_hf_config.pipeline.source import config_of
from tp_hf_config.planning.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("every_width")
COMMANDS = ("check", "repair", "verify", "plan", "prunable", "prune", "export")
RATIO = "--pruning-ratio 0.2"
NEW = f"--out new {RATIO}"
PLAIN = "Give the folder that contains"
ABSENT = "no file or folder of this name exists here, and as a model on the Hub its"
WRONG = {
    "": "Missing command.",
    "prone x": "No such command 'prone'.",
    "--json check x": "--json",
    "check": "Missing argument 'FOLDER'.",
    "check whole --fast": "--fast",
    "check whole bare": "(bare)",
    "check ''": "'': expected a folder, a file or a name",
    "check nowhere": f"nowhere does not exist. {PLAIN} config.json.",
    "check text": f"text is not a folder. {PLAIN} config.json.",
    "check nothing": f"nothing has no config.json. {PLAIN} it.",
    "check bare": "bare has no weights (model.safetensors, ",
    f"check {'x' * 300}": "cannot be read: ",
    "repair nowhere": f"nowhere does not exist. {PLAIN} config.json.",
    "repair bare": "bare has no weights (model.safetensors, ",
    "prune x --out=~nobody-of-this-name/y": "'~nobody-of-this-name/y': expected a path; this home",
    "repair whole --given head_dim": "'head_dim': expected num_attention_heads=4",
    "repair whole --given head_dim=x": "'x': expected a whole number, 1 or more",
    "verify nowhere": f"nowhere does not exist. {PLAIN} config.json.",
    "verify whole nowhere": f"nowhere does not exist. {PLAIN} config.json.",
    "verify whole bare": "bare has no weights (model.safetensors, ",
    "prunable no/such/place": "no/such/place: this file or folder does not exist",
    "prunable nothing": "nothing: this folder has no config.json; expected a folder t",
    "prunable broken": "broken: config.json is not JSON: ",
    "prunable nowhere": f"nowhere: {ABSENT}",
    "prunable us/nowhere": f"us/nowhere: {ABSENT}",
    f"prunable {'x' * 300}/y": "cannot be read: ",
    "plan": "Missing argument 'MODEL'.",
    "plan x": "say how much to prune: --pruning-ratio 0.2, --ratios FIELD=0.2, ",
    f"plan '' {RATIO}": "'': expected a folder, a file or a name",
    f"plan nowhere {RATIO}": f"nowhere: {ABSENT}",
    f"plan text.bin {RATIO}": "expected a folder with a config.json, a GGUF file or a",
    f"plan x {RATIO} --target-params 0.5": "leave --pruning-ratio out",
    f"plan x {RATIO} --gqa group": "add --head-pruning-ratio 0.25",
    f"plan x {RATIO} --ratios a=0.1": "name all fields in --prune",
    "plan x --prune a,b --ratios a=0.1": "no ratio is given for b: add --pruning-ratio 0.2",
    "plan x --steps 0": "Invalid value for '--steps'",
    "prune nowhere --out new": "say how much to prune",
    f"prune x {RATIO}": "Missing option '--out'",
    f"prune nowhere {NEW}": f"nowhere: {ABSENT}",
    f"prune broken {NEW}": "broken: config.json is not JSON: ",
    f"prune whole --out no/such {RATIO}": "Create it first: ",
    f"prune whole --out text {RATIO}": "expected a new folder, found a file. C",
    f"prune whole --out whole {RATIO}": "is not empty. Choose another folder, or",
    f"prune whole {NEW} --calibration ''": "'': expected a folder, a file or a name",
    f"prune whole {NEW} --calibration ./own": "own: calibration text cannot be read: No such fi",
    f"prune whole {NEW} --calibration text": "text: expected plain text in UTF-8, found anothe",
    f"prune whole {NEW} --dtype flaot32": "'flaot32' is not one of 'float32', ",
    f"prune whole {NEW} --importance best": "'best' is not one of 'auto', 'wanda', 'activation'",
    f"prune whole {NEW} --pruning-ration 0.2": "--max-pruning-ratio",
    f"prune whole {NEW} --max-shard-size 5": "'5': expected a size such as 500MB or 5GB",
    "prune x --out y --drop-layers 0": "'0': expected a whole number, 1 or more",
    "prune x --out y --drop-layers 2 --steps 4": "say how much to prune: --pruning-ratio 0.2, ",
    "prune x --out y --drop-layers 2 --round-to 8": "; or leave --round-to out",
    "prune x --out y --drop-layers 1 --per-layer": "; or leave --per-layer out",
    "prune x --out y --drop-layers 1 --ranking isomorphic": "; or leave --ranking out",
    "prune x --out y --ranking global --target-params 0.8": "--ranking gives each layer its ",
    "prune x --out y --allocate": "--allocate needs the size to reach: add --target-params 0.8",
    **{
        f"prune x --out y --allocate --target-params 0.8 {more}": f"leave {more.split()[0]} out"
        for more in (
            "--pruning-ratio 0.2",
            "--ratios intermediate_size=0.2",
            "--head-pruning-ratio 0.5",
            "--gqa query",
            "--max-pruning-ratio 0.5",
            "--ranking global",
            "--no-refit",
        )
    },
    "export whole --out new --to onnx": "'onnx' is not one of 'padded', 'decilm', 'gguf'",
}
"""What is typed -> what is said: everything that is seen before torch is imported."""
VALUES = {
    values.amount: {
        "8.03B": 8_030_000_000,
        "4.1b": 4_100_000_000,
        "16.1M": 16_100_000,
        "1.001k": 1001,
        "1e5": 100_000,
        "0.8": 0.8,
        "80%": 0.8,
    },
    values.share: {"0.25": 0.25, "1/4": 0.25, "25%": 0.25, "33.3%": 0.333},
    values.names: {"a, b": ("a", "b")},
    values.ratios: {"a=1/2,b=0.1": {"a": 0.5, "b": 0.1}},
    values.sizes: {"head_dim=64": {"head_dim": 64}},
    values.layers: {"2": (None, 2), "decoder=2": ("decoder", 2)},
    values.file_size: {"5gb": "5GB"},
    values.calibration: {"own": "own", "./own": Path("own"), "a/text.txt": Path("a/text.txt")},
}
"""A parser -> what is typed -> its value."""
NO_AMOUNT = ("lots", "inf", "1", "1.5", "0", "nan", "infB", "1e999999999", "1/2", "1.0005K")
NO_SHARE = ("0", "0.0", "1.5", "-0.1", "nan", "1e-999999999")
REFUSED = {
    values.amount: {
        **dict.fromkeys(NO_AMOUNT, "a whole number of parameters (100M), or a share of them (0.8)"),
        "120%": "a share between 0 and 1",
    },
    values.share: {
        **dict.fromkeys(NO_SHARE, "a share between 0 and 1"),
        **dict.fromkeys(
            ("1/0", "x", "", "1e999999999", "1e9999999%"), "a share such as 0.2, 1/5 or 20%"
        ),
    },
    values.names: {"a,": "config fields separated by commas: hidden_size,intermediate_size"},
    values.ratios: {
        "a": "hidden_size=0.1,intermediate_size=0.3",
        "a=0.1,a=0.2": "one value for every field, found two for a",
    },
    values.count: dict.fromkeys(("0", "-4", "x", "²"), "a whole number, 1 or more"),
    values.file_size: {"5": "a size such as 500MB or 5GB"},
}
"""A parser -> what is typed -> what it expects."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.save("llama-gqa", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.save("vit", tmp_path_factory.mktemp("models") / "vit")


def test_help_and_wrong_usage_load_no_torch(llama: Path, tmp_path: Path) -> None:
    """All in one process, offline; each mistake ends with 2 and what to type next."""
    config = (llama / "config.json").read_bytes()
    for name, files in {
        "nothing": {},
        "broken": {"config.json": b"{", "model.safetensors": b""},
        "bare": {"config.json": config},
        "whole": {"config.json": config, "model.safetensors": b"cut off"},
    }.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "text.bin").write_bytes(b"")
    out = small.python(
        f"""
        import contextlib, io, os, shlex, sys
        os.environ["HF_HUB_OFFLINE"] = "1"
        from tp_hf_config.cli.main import main
        os.chdir({str(tmp_path)!r})
        for command in {COMMANDS!r}:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                assert main([command, "--help"]) == 0
            assert "--json" in said.getvalue(), command
        for typed in {list(WRONG)!r}:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                print(main(shlex.split(typed)), repr(said.getvalue()))
        print(*sys.modules)
        """
    )
    *lines, loaded = out.splitlines()
    for (typed, message), line in zip(WRONG.items(), lines, strict=True):
        assert line.startswith("2 "), (typed, line)
        said = ast.literal_eval(line[2:])
        assert message in said, (typed, said)
        assert said.splitlines()[-1].startswith("tp-hf-config"), (typed, said)
        assert "Traceback" not in said
    heavy = {"torch", "transformers", "torch_pruning", "numpy"}
    assert not heavy & set(loaded.split())
    assert not (tmp_path / "new").exists()


def test_values() -> None:
    for parse, cases in VALUES.items():
        for typed, value in cases.items():
            assert parse(typed) == value, typed  # type: ignore[operator]
    for parse, refused in REFUSED.items():
        for typed, expected in refused.items():
            with pytest.raises(BadParameter) as error:
                parse(typed)
            assert error.value.message == f"{typed!r}: expected {expected}"


@pytest.mark.parametrize(
    ("typed", "settings"),
    [
        ("", {"importance": None, "calibration": None, "refit": True, "stream": None}),
        ("--importance activation --no-stream", {"importance": "activation", "stream": False}),
        ("--calibration own", {"calibration": "own"}),
        ("--no-refit --recover 8", {"refit": False, "recover": 8}),
        ("--drop-layers decoder=2", {"drop_layers": 2, "drop_from": "decoder"}),
        ("--steps 3 --round-to 8", {"steps": 3}),
    ],
)
def test_what_the_arguments_of_prune_mean(
    capsys: Any,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    settings: dict[str, Any],
) -> None:
    jobs: list[Any] = []

    def prune(job: Any) -> Any:
        jobs.append(job)
        return tp_hf_config.CheckReport("folder", None, None)

    monkeypatch.setattr("tp_hf_config.pipeline.prune.prune_checkpoint", prune)
    common = ("prune", llama, "--out", "no-such-folder", "--pruning-ratio", "1/4")
    assert shell(capsys, *common, *typed.split())[0] == 0
    (job,) = jobs
    assert {name: getattr(job, name) for name in settings} == settings
    assert job.widths["pruning_ratio"] == 0.25
    assert job.command == shlex.join(["tp-hf-config", *map(str, common), *typed.split()])


def test_version(capsys: Any) -> None:
    expected = f"tp-hf-config {tp_hf_config.__version__}\n"
    assert shell(capsys, "--version") == (0, expected, "")


def test_without_typer(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_module, "find_spec", lambda name: None)
    said = "tp-hf-config needs typer: pip install 'tp-hf-config[cli]'\n"
    assert shell(capsys, "check", "x") == (2, "", said)


def test_the_shell_completes_options() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tp_hf_config"],
        cwd=small.ROOT,
        env={
            **os.environ,
            "_TP_HF_CONFIG_COMPLETE": "complete_bash",
            "COMP_WORDS": "tp-hf-config prune --imp",
            "COMP_CWORD": "2",
        },
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("--importance\n", "")


class TestStreams:
    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
    @pytest.mark.parametrize(
        ("typed", "code", "said"),
        [
            ("prunable {} > /dev/full", 141, "output cannot be written: [Errno 28] No space left"),
            ("--help > /dev/full", 141, "output cannot be written: [Errno 28] No space left"),
            ("--version >&- 2>&-", 0, ""),
            ("check nowhere 2> /dev/full", 2, ""),
            ("check nowhere 2>&-", 2, ""),
        ],
    )
    def test_output_that_cannot_be_written(
        self, vit: Path, typed: str, code: int, said: str
    ) -> None:
        """1 would say that a folder is not sound."""
        command = f"{shlex.quote(sys.executable)} -m tp_hf_config {typed.format(vit)}"
        done = subprocess.run(
            f"unset PYTHONUNBUFFERED; {command}",
            shell=True,
            cwd=small.ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert done.returncode == code
        assert said in done.stderr if said else not done.stderr

    def test_nobody_reads_the_output(self, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
        assert main(["check", "nowhere", "--json"]) == 141
        assert "the output" not in capsys.readouterr().err
        sys.stdout.close()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
    def test_progress_that_cannot_be_written_stops_no_work(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
        monkeypatch.setattr(sys, "stderr", full)
        show("step 1")
        assert list(track([3, 4], 2, "measuring")) == [3, 4]
        with pytest.raises(OSError, match="No space left"):
            full.close()

    def test_progress(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lines, and on a terminal a bar that is removed at the end."""
        for terminal in (False, True):
            monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
            monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
            assert list(track([3, 4], 2, "measuring")) == [3, 4]
            assert stream.getvalue().startswith("measuring: 2 windows\n")
            assert ("0/2" in stream.getvalue()) is terminal

    def test_warnings_are_lines(self, capsys: Any) -> None:
        """A layer that is ranked twice is told of once; the warnings of others are not shown."""
        with _few_warnings():
            for _ in range(2):
                warnings.warn("few tokens", CalibrationWarning, stacklevel=1)
                warnings.warn("no effect", PrunerSettingsWarning, stacklevel=1)
                warnings.warn("another's", UserWarning, stacklevel=1)
        lines = ["few tokens", "no effect", "no effect"]
        assert capsys.readouterr().err == "".join(f"warning: {line}\n" for line in lines)


class TestTables:
    def test_plan(self, capsys: Any, llama: Path) -> None:
        arguments = ("--pruning-ratio", "0.25", "--head-pruning-ratio", "1/2", "--gqa", "group")
        expected = tp_hf_config.plan(
            AutoConfig.from_pretrained(llama),
            pruning_ratio=0.25,
            head_pruning_ratio=0.5,
            gqa="group",
            iterative_steps=2,
        )
        code, out, errors = shell(capsys, "plan", llama, *arguments, "--steps", 2)
        assert (code, out, errors) == (0, f"{expected}\n", "")
        code, out, errors = shell(capsys, "plan", llama, *arguments, "--steps", 2, "--json")
        assert (code, json.loads(out), errors) == (0, expected.to_dict(), "")
        assert expected.values == {
            "num_key_value_heads": 1,
            "num_attention_heads": 2,
            "hidden_size": 48,
            "intermediate_size": 96,
        }

    def test_plan_of_heads_alone_of_fields_and_to_a_size(self, capsys: Any, llama: Path) -> None:
        def widths(*typed: str) -> dict[str, int]:
            _, out, _ = shell(capsys, "plan", llama, *typed, "--json")
            return {k: v for width in json.loads(out)["widths"] for k, v in width["after"].items()}

        assert widths("--head-pruning-ratio", "0.5") == {"num_attention_heads": 2}
        assert widths("--prune", "intermediate_size", "--pruning-ratio", "0.5") == {
            "intermediate_size": 64
        }
        fields = ("--ratios", "intermediate_size=0.5,hidden_size=0.25")
        assert widths(*fields) == {"hidden_size": 48, "intermediate_size": 64}
        assert widths(*fields, "--round-to", "32") == {"hidden_size": 32, "intermediate_size": 64}
        _, out, _ = shell(capsys, "plan", llama, "--target-params", "60K", "--json")
        found = json.loads(out)
        assert found["target"] == 60_000
        assert 50_000 < found["after"]["parameters"] <= 60_000

    def test_a_target_out_of_reach(self, capsys: Any, llama: Path) -> None:
        code, out, errors = shell(capsys, "plan", llama, "--target-params", "10")
        assert (code, out) == (1, "")
        assert errors.startswith(f"tp-hf-config plan: {llama}: ")
        assert (
            "target_params=10: with one ratio for hidden_size, intermediate_size, at least"
            in errors
        )

    def test_what_the_class_refuses(
        self, capsys: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Trajectory, "_ask", lambda _, values: Refusal("never"))
        code, out, _ = shell(capsys, "plan", llama, "--pruning-ratio", "0.25")
        assert code == 1
        assert "refused at step 1 (hidden_size 48, intermediate_size 96): never." in out

    def test_prunable(self, capsys: Any, vit: Path) -> None:
        expected = tp_hf_config.prunable(AutoConfig.from_pretrained(vit))
        assert shell(capsys, "prunable", vit) == (0, f"{expected}\n", "")
        code, out, errors = shell(capsys, "prunable", vit, "--json")
        assert (code, json.loads(out), errors) == (0, expected.to_dict(), "")
        assert expected.model == "ViTForImageClassification"

    def test_no_weights_are_read(self, capsys: Any, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
        tables = []
        for folder in (tmp_path, llama):
            code, out, errors = shell(capsys, "prunable", folder)
            assert (code, errors) == (0, "")
            lines = out.splitlines()  # the second may be read from the cache, and say so
            tables.append([line for line in lines if "TP_HF_CONFIG_CACHE" not in line])
        assert tables[0] == tables[1]
        assert len(tables[0]) > 5


class TestFaults:
    def test_a_misspelt_field(self, capsys: Any, vit: Path) -> None:
        widths = tp_hf_config.prunable(AutoConfig.from_pretrained(vit)).widths
        offered = [width.name for width in widths if width.reason is None]
        assert "intermediate_size" in offered
        code, out, errors = shell(
            capsys, "plan", vit, "--prune", "hiden_size", "--pruning-ratio", "0.2"
        )
        assert (code, out) == (2, "")
        assert errors == (
            "tp-hf-config plan: ViTForImageClassification cannot prune hiden_size: no such width "
            f"(did you mean hidden_size?). Widths that can be pruned: {', '.join(offered)}.\n"
        )

    def test_the_same_as_json(self, capsys: Any, vit: Path) -> None:
        typed = ("plan", vit, "--prune", "hiden_size", "--pruning-ratio", "0.2")
        _, _, said = shell(capsys, *typed)
        code, out, errors = shell(capsys, *typed, "--json")
        found = json.loads(out)
        assert (code, errors) == (2, said)
        assert (found["type"], found["code"]) == ("UnknownFieldError", 2)
        assert f"tp-hf-config plan: {found['error']}\n" == said

    def test_no_model_there(self, capsys: Any, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "x.gguf").write_bytes(b"no GGUF")
        (tmp_path / "weights.bin").write_bytes(b"")
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "config.json").write_text("{")
        (tmp_path / "strange").mkdir()
        (tmp_path / "strange" / "config.json").write_text('{"model_type": "nothing"}')
        for name, message in {
            "nowhere": "this file or folder does not exist\n",
            "nowhere.gguf": "this file or folder does not exist\n",
            "models": f"this folder has no config.json, but a GGUF file. Give the file: {tmp_path}"
            "/models/x.gguf\n",
            "weights.bin": "expected a folder with a config.json, a GGUF file or a Hub id, found a "
            f".bin file. If it contains a model's weights, give its folder: {tmp_path}\n",
            ".": "this folder has no config.json, but a folder inside does. Give it: "
            f"{tmp_path}/broken\n",
            "broken": "config.json is not JSON: Expecting property name enclosed in double ",
            "strange": "its config cannot be read: ValueError: The checkpoint you are trying to ",
        }.items():
            code, out, errors = shell(capsys, "prunable", tmp_path / name)
            assert (code, out) == (1 if name == "strange" else 2, "")
            assert errors.startswith(f"tp-hf-config prunable: {tmp_path / name}: {message}")
            assert "Traceback" not in errors

    @pytest.fixture
    def own_code(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
        """A folder whose class is code in it, and a file that is there once the code has run."""
        monkeypatch.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache")
        )
        folder, ran = tmp_path / "own", tmp_path / "ran"
        folders.with_code(folders.save("llama-gqa", folder), ran)
        return folder, ran

    def test_code_runs_only_when_told_to(self, capsys: Any, own_code: tuple[Path, Path]) -> None:
        folder, ran = own_code
        code, _, errors = shell(capsys, "prunable", folder)
        assert code == 1
        assert errors == (
            f"tp-hf-config prunable: {folder}: modeling_own.Own is code that comes with the model, "
            "which is not run by default. Read its .py files, then add "
            "--trust-remote-code\n"
        )
        assert not ran.exists()
        code, out, _ = shell(capsys, "prunable", folder, "--trust-remote-code")
        assert (code, out.splitlines()[0]) == (0, "Own")
        assert ran.exists()

    def test_what_is_not_judged(self, capsys: Any, own_code: tuple[Path, Path]) -> None:
        """Could not tell; what is refused by other commands is 1."""
        folder, ran = own_code
        for command, expected in (("check", 2), ("repair", 1)):
            code, out, errors = shell(capsys, command, folder)
            assert (code, out) == (expected, "")
            assert f"{folder}: its class is code in the folder" in errors
        assert not ran.exists()

    def test_unforeseen(self, capsys: Any, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any) -> None:
            raise ZeroDivisionError("by zero")

        monkeypatch.setattr("tp_hf_config.cli.commands.config_of", broken)
        code, out, errors = shell(capsys, "prunable", vit)
        assert (code, out) == (2, "")
        assert errors == (
            "tp-hf-config prunable: ZeroDivisionError: by zero\n"
            "This error was not expected: --debug shows where it happened.\n"
        )
        code, _, errors = shell(capsys, "prunable", vit, "--debug")
        assert code == 2
        assert errors.startswith("Traceback (most recent call last):")
        assert "\ntp-hf-config prunable: ZeroDivisionError: by zero\n" in errors

    def test_what_libraries_print_is_no_part_of_the_json(
        self, capsys: Any, vit: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = config_of

        def talking(*arguments: Any) -> Any:
            print("chatter")
            return read(*arguments)

        monkeypatch.setattr("tp_hf_config.cli.commands.config_of", talking)
        code, out, errors = shell(capsys, "prunable", vit, "--json")
        assert (code, errors) == (0, "chatter\n")
        assert json.loads(out)["model"] == "ViTForImageClassification"

    def test_ctrl_c(self, capsys: Any, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("tp_hf_config.cli.commands.config_of", interrupted)
        assert shell(capsys, "prunable", vit) == (130, "", "tp-hf-config prunable: interrupted\n")


class TestStopping:
    @pytest.fixture(autouse=True)
    def as_in_a_shell(self) -> Iterator[None]:
        """What runs in the background starts with Ctrl-C ignored."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in numbers}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_other_signals_end_the_process_as_an_exception(
        self, vit: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
    ) -> None:
        """So that what is half-written is removed."""
        monkeypatch.setattr(sys, "argv", ["tp-hf-config", "prunable", str(vit)])
        monkeypatch.setattr(
            "tp_hf_config.cli.commands.config_of", lambda _: signal.raise_signal(number)
        )
        with pytest.raises(SystemExit) as ended:
            main_module.run()
        assert ended.value.code == 128 + number

    def test_ignored_stays_ignored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As ``nohup`` ignores that the terminal is closed."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        monkeypatch.setattr(sys, "argv", ["tp-hf-config", "--version"])
        assert main_module.run() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    def test_ctrl_c_before_the_command_starts(
        self, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(main_module, "main", lambda: signal.raise_signal(signal.SIGINT))
        assert main_module.run() == 130
        assert capsys.readouterr().err == "tp-hf-config: interrupted\n"
