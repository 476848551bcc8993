"""The shell command: help, usage, tables, JSON, exit codes, streams."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import model_folders as folders
import pytest
import small
from shell import Terminal, shell
from transformers import AutoConfig

import tp_hf_config
from tp_hf_config.cli import completion, console, stopping
from tp_hf_config.cli import main as main_module
from tp_hf_config.cli import prune as prune_module
from tp_hf_config.cli.arguments import amount
from tp_hf_config.cli.main import main
from tp_hf_config.errors import CalibrationWarning, PrunerSettingsWarning
from tp_hf_config.model.build import Refusal
from tp_hf_config.pipeline import source
from tp_hf_config.pipeline.job import Importance
from tp_hf_config.planning.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("every_width")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.save("llama-gqa", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.save("vit", tmp_path_factory.mktemp("models") / "vit")


class TestLight:
    @pytest.mark.parametrize(
        ("typed", "code", "printed"),
        [
            ("--help", 0, "prune a model and write it, once it is proved to load again"),
            ("prune x --out y --pruning-ratio 2", 2, ""),
            ("prune x --out y", 2, ""),
            ("prune no/such/model --out y --pruning-ratio 0.2", 2, ""),
        ],
    )
    def test_help_and_wrong_usage_load_no_torch(self, typed: str, code: int, printed: str) -> None:
        """As ``python -m tp_hf_config`` does it."""
        out = small.python(
            f"""
            import runpy, sys
            sys.argv[1:] = {typed.split()!r}
            try:
                runpy.run_module("tp_hf_config", run_name="__main__", alter_sys=True)
            except SystemExit as ended:
                print("ended", ended.code)
            print(*sys.modules)
            """
        )
        *lines, loaded = out.splitlines()
        assert lines[-1] == f"ended {code}"
        assert printed in out
        assert "tp_hf_config.cli.prune" in loaded.split()
        heavy = {"torch", "transformers", "torch_pruning", "rich", "shtab", "numpy"}
        assert not heavy & set(loaded.split())

    def test_wrong_paths_and_arguments_load_no_torch(self, llama: Path, tmp_path: Path) -> None:
        """Every command, in one process, offline; each ends with 2 and what to type next."""
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
        plain = "Say the folder that holds"
        ratio = ("--pruning-ratio", "0.2")
        new = ("--out", "new", *ratio)
        prune = ("prune", "whole", *new)
        cases = {
            ("check", "nowhere"): f"nowhere does not exist. {plain} config.json.",
            ("check", "text"): f"text is not a folder. {plain} config.json.",
            ("check", "nothing"): f"nothing has no config.json. {plain} it.",
            ("check", "bare"): "bare has no weights (model.safetensors, ",
            ("check", "x" * 300): "cannot be read: ",
            ("repair", "nowhere"): f"nowhere does not exist. {plain} config.json.",
            ("repair", "bare"): "bare has no weights (model.safetensors, ",
            ("repair", "whole", "--out", "nothing"): "nothing is there already. Say a folder that",
            (
                "repair",
                "whole",
                "--out",
                "whole/new",
            ): "whole/new is inside whole, which is copied. Say a folder outside.",
            (
                "repair",
                "whole",
                "--given",
                "head_dim",
            ): "'head_dim': expected num_attention_heads=4",
            ("repair", "whole", "--given", "head_dim=x"): "'x': expected a whole number, 1 or more",
            ("repair", "whole", "--heads", "0"): "'0': expected a whole number, 1 or more",
            ("repair", "whole", "--head-dim", "-4"): "'-4': expected a whole number, 1 or more",
            (
                "repair",
                "whole",
                "--heads",
                "4",
                "--given",
                "num_attention_heads=2",
            ): "num_attention_heads: --heads says 4, --given says 2. Leave one of them out",
            ("verify", "nowhere"): f"nowhere does not exist. {plain} config.json.",
            ("verify", "whole", "nowhere"): f"nowhere does not exist. {plain} config.json.",
            ("verify", "whole", "--against", "bare"): "bare has no weights (model.safetensors, ",
            ("verify", "whole", "whole", "--against", "whole"): "say it once: verify whole whole",
            ("prunable", "no/such/place"): "no/such/place: there is no such file or folder",
            ("prunable", "nothing"): "nothing: no config.json in this folder; expected what save_",
            ("prunable", "broken"): "broken: config.json is not JSON: ",
            ("prunable", "nowhere"): "nowhere: no such file or folder here, and as a model on the",
            ("prunable", "us/nowhere"): "us/nowhere: no such file or folder here, and as a model",
            ("prunable", "x" * 300 + "/y"): "cannot be read: ",
            ("plan", "nowhere", *ratio): "nowhere: no such file or folder here, and as a model on",
            ("plan", "text.bin", *ratio): "expected a folder with a config.json, a GGUF file or a",
            ("prune", "nowhere", *new): "nowhere: no such file or folder here, and as a model on t",
            ("prune", "broken", *new): "broken: config.json is not JSON: ",
            ("prune", "whole", "--out", "no/such", *ratio): "Make it first: ",
            (
                "prune",
                "whole",
                "--out",
                "text",
                *ratio,
            ): "expected a new folder, found a file. C",
            ("prune", "whole", "--out", "whole", *ratio): "is not empty. Choose another folder, or",
            (*prune, "--calibration", ""): "'': expected a folder, a file or a name",
            (*prune, "--calibration", "./own"): "own: calibration text cannot be read: No such fi",
            (*prune, "--calibration", "none"): "none: calibration text cannot be read: No such fi",
            (*prune, "--calibration", "text"): "text: expected plain text in UTF-8, found other b",
            (*prune, "--dtype", "flaot32"): "invalid choice: 'flaot32' (choose from 'float32', ",
            (
                *prune,
                "--pruning-ration",
                "0.2",
            ): "there is no option --pruning-ration: did you mean --pruning-ratio?",
            ("check", "whole", "--fast"): "there is no option --fast: tp-hf-config check --help ",
            ("check", "whole", "bare"): "found bare, expected nothing after FOLDER",
            ("check", ""): "'': expected a folder, a file or a name",
            ("plan", "", *ratio): "'': expected a folder, a file or a name",
            ("completion", "bsh"): "invalid choice: 'bsh'",
        }
        out = small.python(
            f"""
            import contextlib, io, os, sys
            os.environ["HF_HUB_OFFLINE"] = "1"
            from tp_hf_config.cli.main import main
            os.chdir({str(tmp_path)!r})
            for typed in {list(cases)!r}:
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    print(main([*typed]), repr(said.getvalue()))
            print(*sys.modules)
            """
        )
        *lines, loaded = out.splitlines()
        for (typed, message), line in zip(cases.items(), lines, strict=True):
            assert line.startswith("2 "), (typed, line)
            assert message in ast.literal_eval(line[2:]), (typed, line)
            assert "Traceback" not in line
        assert "huggingface_hub" in loaded.split()
        assert not {"torch", "transformers", "torch_pruning", "rich", "numpy"} & {*loaded.split()}
        assert not (tmp_path / "new").exists()

    def test_nobody_reads_the_output(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "tp_hf_config", "completion", "bash"],
            cwd=small.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate()
        assert (process.returncode, errors) == (141, b"")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
    @pytest.mark.parametrize(
        ("typed", "code", "said"),
        [
            ("completion bash > /dev/full", 141, "{}: [Errno 28] No space left on device"),
            ("--help > /dev/full", 141, "{}: [Errno 28] No space left on device"),
            ("completion bash >&-", 0, ""),
            ("completion bash 2>&-", 0, ""),
            ("completion bash >&- 2>&-", 0, ""),
            ("completion bash > /dev/full 2>&1", 141, ""),
            ("check nowhere 2> /dev/full", 2, ""),
            ("check nowhere 2>&-", 2, ""),
        ],
    )
    def test_output_that_cannot_be_written(self, typed: str, code: int, said: str) -> None:
        """1 would say that a folder is not sound."""
        command = f"unset PYTHONUNBUFFERED; {shlex.quote(sys.executable)} -m tp_hf_config {typed}"
        done = subprocess.run(
            command, shell=True, cwd=small.ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        said = said.format("tp-hf-config: the output cannot be written")
        assert (done.returncode, done.stderr.decode()) == (code, f"{said}\n" if said else "")

    def test_a_closed_stream_has_no_terminal(
        self, capsys: Any, vit: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, None)
        assert main(["check", str(vit)]) == 0
        assert not console.rich_on(sys.stderr)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
    def test_progress_that_cannot_be_written_stops_no_work(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
        monkeypatch.setattr(sys, "stderr", full)
        lines = console.Lines()
        lines.say("step 1")
        lines.failed("step 2")
        assert list(lines.track([3, 4], 2, "measuring")) == [3, 4]
        with pytest.raises(OSError, match="No space left"):
            full.close()

    def test_version(self, capsys: Any) -> None:
        code, out, _ = shell(capsys, "--version")
        assert (code, out) == (0, f"tp-hf-config {tp_hf_config.__version__}\n")

    def test_every_command_has_help_and_json(self, capsys: Any) -> None:
        for command in ("check", "repair", "verify", "plan", "prunable", "prune", "completion"):
            code, out, _ = shell(capsys, command, "--help")
            assert code == 0
            assert "--json" in out


class TestUsage:
    @pytest.mark.parametrize(
        ("typed", "message"),
        [
            ("", "the following arguments are required: COMMAND"),
            ("prone x", "invalid choice: 'prone'"),
            ("plan", "the following arguments are required: MODEL"),
            ("prune x --pruning-ratio 0.2", "the following arguments are required: --out"),
            ("plan x --pruning-ratio 0", "0 prunes nothing: expected a share such as 0.2"),
            ("plan x --pruning-ratio 0.0", "0 prunes nothing: expected a share such as 0.2"),
            ("plan x --pruning-ratio 1.5", "'1.5': expected a share between 0 and 1"),
            ("plan x --pruning-ratio -0.1", "'-0.1': expected a share between 0 and 1"),
            ("plan x --pruning-ratio 1/0", "'1/0': expected a share such as 0.2, 1/5 or 20%"),
            ("plan x --pruning-ratio nan", "'nan': expected a share between 0 and 1"),
            ("plan x --pruning-ratio 1e999999999", "'1e999999999': expected a share between 0 "),
            ("plan x --pruning-ratio 1e-999999999", "0 prunes nothing: expected a share such as"),
            ("plan x --pruning-ratio 1e999999999%", "'1e999999999%': expected a share between"),
            ("plan x --prune a,", "'a,': expected config fields with commas between"),
            ("plan x --ratios a", "'a': expected hidden_size=0.1,intermediate_size=0.3"),
            ("plan x --ratios a=2", "'2': expected a share between 0 and 1"),
            ("plan x --steps 0", "'0': expected a whole number, 1 or more"),
            ("plan x --target-params lots", "'lots': expected a number of parameters (100M)"),
            ("plan x --target-params inf", "'inf': expected a number above 0"),
            ("plan x --target-params 1", "'1': expected a whole number of parameters (100M), or a"),
            ("plan x --target-params 1.5", "'1.5': expected a whole number of parameters (100M)"),
            ("plan x --target-params 120%", "'120%': expected a share between 0 and 1"),
            ("plan x --ratios a=0.1,a=0.2", "expected one value for every field, found two for a"),
            ("plan x --target-params nan", "'nan': expected a number above 0"),
            ("plan x --target-params infB", "'infB': expected a number above 0"),
            ("plan x --target-params 1e999999999", "'1e999999999': expected a number above 0"),
            ("plan x --target-params 1/2", "'1/2': expected a number of parameters (100M)"),
            ("plan x --target-params 1.0005K", "'1.0005K': expected a whole number of parameters"),
            (
                "--json check x",
                "--json is typed before the command: put it behind, tp-hf-config ch",
            ),
            (
                "prune x --out y --drop-layers 2 --steps 4",
                "--steps says how widths are pruned, not how much goes: add --pruning-ratio 0.2",
            ),
            ("prune x --out y --drop-layers 2 --round-to 8", "--round-to says how widths are"),
            ("prune x --out y --drop-layers 2 --max-pruning-ratio 0.5", "--max-pruning-ratio says"),
            ("prune x --out y --max-shard-size big", "'big': expected a size such as 500MB or 5GB"),
            (
                "prune x --out y --device moon",
                "'moon': expected a device such as cpu, cuda or cuda:1",
            ),
            ("prune x --out y --importance best", "invalid choice: 'best'"),
            ("plan x", "say how much to prune: --pruning-ratio 0.2, --ratios FIELD=0.2, "),
            ("plan x --pruning-ratio 0.2 --target-params 0.5", "leave --pruning-ratio out"),
            (
                "repair x --out=~nobody-of-this-name/y",
                "'~nobody-of-this-name/y': expected a path; there is no such home folder",
            ),
            ("plan x --pruning-ratio 0.2 --gqa group", "add --head-pruning-ratio 0.25"),
            ("plan x --pruning-ratio 0.2 --ratios a=0.1", "name them all in --prune"),
            ("plan x --prune a,b --ratios a=0.1", "which share of b? Add --pruning-ratio 0.2"),
        ],
    )
    def test_wrong(self, capsys: Any, typed: str, message: str) -> None:
        code, out, errors = shell(capsys, *typed.split())
        assert (code, out) == (2, "")
        assert errors.startswith("usage: tp-hf-config ")
        assert message in errors

    @pytest.mark.parametrize(
        ("typed", "meant"),
        [
            ("8.03B", 8_030_000_000),
            ("4.1b", 4_100_000_000),
            ("8.2B", 8_200_000_000),
            ("16.1M", 16_100_000),
            ("1.001k", 1001),
            ("1e5", 100_000),
            ("0.8", 0.8),
            ("80%", 0.8),
        ],
    )
    def test_ways_to_write_an_amount(self, typed: str, meant: float) -> None:
        assert amount(typed) == meant

    def test_ways_to_write_a_share(self, capsys: Any, llama: Path) -> None:
        shares = ("0.25", "1/4", "25%")
        plans = [shell(capsys, "plan", llama, "--pruning-ratio", one)[1] for one in shares]
        assert plans[0] == plans[1] == plans[2]
        assert "64   48" in plans[0]


class TestJob:
    """What the arguments of ``prune`` mean."""

    @pytest.mark.parametrize(
        ("typed", "settings"),
        [
            ("", {}),
            ("--importance obs", {"importance": "obs"}),
            ("--calibration own", {"calibration": "own"}),
            ("--calibration ./own", {"calibration": Path("own")}),
            ("--calibration a/text.txt", {"calibration": Path("a/text.txt")}),
            ("--no-compensate --recover 8", {"compensate": False, "recover": 8}),
        ],
    )
    def test_how(self, llama: Path, typed: str, settings: dict[str, Any]) -> None:
        common = ["prune", str(llama), "--out", "out", "--pruning-ratio", "0.25"]
        options = main_module.parser_of().parse_args([*common, *typed.split()])
        options.typed = typed
        expected: dict[str, Any] = {
            "importance": None,
            "calibration": None,
            "compensate": True,
            "recover": 0,
        }
        job = prune_module._job(options)
        assert {name: getattr(job, name) for name in expected} == expected | settings

    def test_all_importances_are_choices(self) -> None:
        (commands,) = (
            action.choices
            for action in main_module.parser_of()._actions
            if isinstance(action, argparse._SubParsersAction)
        )
        (action,) = (one for one in commands["prune"]._actions if one.dest == "importance")
        assert action.choices == get_args(Importance)


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
        assert found["target_parameters"] == 60_000
        assert 50_000 < found["after"]["parameters"] <= 60_000

    def test_a_target_out_of_reach(self, capsys: Any, llama: Path) -> None:
        code, out, errors = shell(capsys, "plan", llama, "--target-params", "10")
        assert (code, out) == (1, "")
        assert errors.startswith(f"tp-hf-config plan: {llama}: ")
        assert "target_params=10: one ratio for hidden_size, intermediate_size leaves at" in errors

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

    def test_drawn_on_a_terminal(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "140")
        for command in (["prunable", str(llama)], ["plan", str(llama), "--pruning-ratio", "0.5"]):
            monkeypatch.setattr(sys, "stdout", terminal := Terminal())
            assert main(command) == 0
            assert "┏━" in terminal.getvalue()
            assert "intermediate_size" in terminal.getvalue()

    def test_plain_without_rich(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(console, "find_spec", lambda name: None)
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        assert main(["prunable", str(llama)]) == 0
        assert terminal.getvalue().startswith("LlamaForCausalLM\nconfig field ")


def test_warnings_are_lines(capsys: Any) -> None:
    """A layer that is ranked twice is told of once; the warnings of others are not shown."""
    with main_module._few_warnings():
        for _ in range(2):
            warnings.warn("few tokens", CalibrationWarning, stacklevel=1)
            warnings.warn("no effect", PrunerSettingsWarning, stacklevel=1)
            warnings.warn("another's", UserWarning, stacklevel=1)
    lines = ["few tokens", "no effect", "no effect"]
    assert capsys.readouterr().err == "".join(f"warning: {line}\n" for line in lines)


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
            f"(did you mean hidden_size?). Widths that can: {', '.join(offered)}.\n"
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
            "nowhere": "there is no such file or folder\n",
            "nowhere.gguf": "there is no such file or folder\n",
            "models": f"no config.json in this folder, but a GGUF file. Say which file: {tmp_path}"
            "/models/x.gguf\n",
            "weights.bin": "expected a folder with a config.json, a GGUF file or a Hub id, found a "
            f".bin file. For a model's weights, give the folder: {tmp_path}\n",
            ".": "no config.json in this folder, but in one inside. Give that: "
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
            "and it is not run unless you say so. Look at its .py files, then add "
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

        monkeypatch.setattr(source, "config_of", broken)
        code, out, errors = shell(capsys, "prunable", vit)
        assert (code, out) == (2, "")
        assert errors == (
            "tp-hf-config prunable: ZeroDivisionError: by zero\n"
            "This is not foreseen: --debug shows where it happened.\n"
        )
        code, _, errors = shell(capsys, "prunable", vit, "--debug")
        assert code == 2
        assert errors.startswith("Traceback (most recent call last):")
        assert errors.endswith("tp-hf-config prunable: ZeroDivisionError: by zero\n")

    def test_what_libraries_print_is_no_part_of_the_json(
        self, capsys: Any, vit: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = source.config_of

        def talking(*arguments: Any) -> Any:
            print("chatter")
            return read(*arguments)

        monkeypatch.setattr(source, "config_of", talking)
        code, out, errors = shell(capsys, "prunable", vit, "--json")
        assert (code, errors) == (0, "chatter\n")
        assert json.loads(out)["model"] == "ViTForImageClassification"

    def test_ctrl_c(self, capsys: Any, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(source, "config_of", interrupted)
        assert shell(capsys, "prunable", vit) == (130, "", "tp-hf-config prunable: interrupted\n")


RUN_FROM_C = """
import ctypes, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from tp_hf_config.cli import main, prunable
run = ctypes.pythonapi.PyRun_String
run.restype = ctypes.py_object
run.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.py_object, ctypes.py_object]
def command(options):
    run(b"import signal; signal.raise_signal(signal.SIGINT)", 257, {}, {})
prunable.check = command
sys.argv = ["tp-hf-config", "prunable", "x"]
sys.exit(main.run())
"""

HANGING_UP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from tp_hf_config.cli import main, prunable
def command(options):
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    signal.raise_signal(signal.SIGHUP)
prunable.check = command
sys.argv = ["tp-hf-config", "prunable", sys.argv[1]]
sys.exit(main.run())
"""


class TestStopping:
    """Ctrl-C as a terminal gives it; what runs in the background starts with it ignored."""

    @pytest.fixture(autouse=True)
    def as_in_a_shell(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        hung_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        yield
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGHUP, hung_up)

    @pytest.mark.parametrize(
        ("number", "code", "said"),
        [
            (signal.SIGINT, 130, "interrupted"),
            (signal.SIGTERM, 143, "terminated"),
            (signal.SIGHUP, 129, "hung up"),
        ],
    )
    @pytest.mark.parametrize("turned_into", [None, ModuleNotFoundError, SystemExit])
    def test_a_library_turns_it_into_something_else(
        self,
        capsys: Any,
        vit: Path,
        monkeypatch: pytest.MonkeyPatch,
        number: signal.Signals,
        code: int,
        said: str,
        turned_into: type[BaseException] | None,
    ) -> None:
        def imports(*_: Any) -> None:
            try:
                signal.raise_signal(number)
            except BaseException:
                if turned_into is not None:
                    raise turned_into("Could not import module") from None
                stopping.stop_if_asked()

        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = [signal.getsignal(one) for one in signals]
        monkeypatch.setattr(source, "config_of", imports)
        assert shell(capsys, "prunable", vit) == (code, "", f"tp-hf-config prunable: {said}\n")
        assert handlers == [signal.getsignal(one) for one in signals]

    @pytest.mark.parametrize("shown", [console.Lines(), console.Bar(None)])
    def test_a_library_swallows_it(self, shown: Any) -> None:
        """The next thing that is said is the end: nothing more is done."""
        with stopping.stoppable():
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(stopping.Interrupted):
                shown.say("loading")
        with stopping.stoppable():
            stopping.stop_if_asked()  # another command

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
    def test_ignored_stays_ignored(self, number: signal.Signals) -> None:
        """As ``nohup`` ignores that the terminal is closed."""
        before = signal.signal(number, signal.SIG_IGN)
        try:
            with stopping.stoppable():
                signal.raise_signal(number)
                stopping.stop_if_asked()
            assert signal.getsignal(number) is signal.SIG_IGN
        finally:
            signal.signal(number, before)

    def test_a_terminal_that_is_gone_takes_no_more_text(self, vit: Path) -> None:
        """What was asked for decides the exit code, not that nobody can be told."""
        done = subprocess.run(
            [sys.executable, "-c", HANGING_UP, str(vit)], cwd=small.ROOT, capture_output=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (129, b"", b"")

    def test_through_code_that_is_run_from_c(self) -> None:
        """Of a plain KeyboardInterrupt Python remembers that, and dies of the signal at its end."""
        done = subprocess.run(
            [sys.executable, "-c", RUN_FROM_C], cwd=small.ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (130, "tp-hf-config prunable: interrupted\n")

    def test_while_the_outcome_is_shown(self, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def shown(_: Any) -> None:
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(main_module, "show", shown)
        monkeypatch.setattr(sys, "argv", ["tp-hf-config", "completion", "bash"])
        assert main_module.run() == 130
        assert capsys.readouterr().err == "tp-hf-config: interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # the process is at its end


class TestCompletion:
    @pytest.mark.parametrize("name", ["bash", "zsh", "fish", "tcsh"])
    def test_the_script_knows_the_commands(self, capsys: Any, name: str) -> None:
        code, out, _ = shell(capsys, "completion", name)
        assert code == 0
        assert all(word in out for word in ("prunable", "pruning-ratio", "head-pruning-ratio"))

    def test_bash_takes_it(self, capsys: Any, tmp_path: Path) -> None:
        (tmp_path / "script").write_text(shell(capsys, "completion", "bash")[1])
        asked = "COMP_WORDS=(tp-hf-config prune --imp); COMP_CWORD=2; _shtab_tp_hf_config"
        done = subprocess.run(
            ["bash", "-c", f"source ./script; {asked}; echo ${{COMPREPLY[@]}}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.stdout == "--importance\n"

    def test_without_shtab(self, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(completion, "find_spec", lambda name: None)
        code, out, errors = shell(capsys, "completion", "bash")
        assert (code, out) == (1, "")
        assert errors == (
            "tp-hf-config completion: completion needs shtab: pip install 'tp-hf-config[cli]'\n"
        )
