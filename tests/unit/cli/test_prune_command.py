"""``tp-hf-config prune``: what it writes, that it writes it whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deep_zoo
import model_folders as folders
import pytest
import small
import tiny
import torch
import transformers as hf
from huggingface_hub.repocard import metadata_load
from safetensors import SafetensorError
from shell import Terminal, shell
from smollm2_file import gguf_file

from tp_hf_config import Calibration
from tp_hf_config.calibration import measured as measured_model
from tp_hf_config.checkpoint import folder as folder_module
from tp_hf_config.cli.main import main
from tp_hf_config.model.build import Refusal
from tp_hf_config.pipeline import output, prune
from tp_hf_config.pipeline import text as text_module
from tp_hf_config.pipeline.job import HELD_OUT, SECOND_TEXT
from tp_hf_config.planning.trajectory import Trajectory
from tp_hf_config.reports import MOST_LINES

pytestmark = pytest.mark.usefixtures("one_thread", "every_width")
QUARTER = ("--pruning-ratio", "0.25")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("llama-gqa", "bert", "roberta", "vit", "t5"):
        folders.save(name, root / name)
    folders.save_text(root / "text.txt")
    return root


def logits(folder: Path, cls: Any, model: Any = None) -> torch.Tensor:
    model = cls.from_pretrained(folder).eval() if model is None else model
    with torch.no_grad():
        result = model(**tiny.inputs(model))
    return result.get("logits", result[0])  # type: ignore[no-any-return]


class TestWhatIsWritten:
    def test_the_nearest_number_that_the_class_takes(
        self, capsys: Any, models: Path, tmp_path: Path
    ) -> None:
        """What a plan says is done: 2.8 of 4 query heads for 2 key/value heads are 2."""
        out = tmp_path / "out"
        heads = ("--head-pruning-ratio", "0.3", "--gqa", "query")
        said = "the ratios ask for num_attention_heads 2.8"
        code, printed, _ = shell(capsys, "plan", models / "llama-gqa", *heads)
        assert (code, said in printed) == (0, True)
        typed = ("prune", models / "llama-gqa", "--out", out, *heads, "--no-refit")
        code, printed, _ = shell(capsys, *typed, "--importance", "magnitude", "--json")
        found = json.loads(printed)
        assert code == 0
        assert any(said in note for note in found["notes"])
        assert hf.AutoConfig.from_pretrained(out).num_attention_heads == 2

    def test_llama_with_recovery(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        typed = ("prune", models / "llama-gqa", "--out", out, *QUARTER, "--steps", 2, "--json")
        typed += ("--calibration", models / "text.txt", "--recover", 5)
        code, printed, errors = shell(capsys, *typed)
        found = json.loads(printed)
        assert code == 0
        assert found["fields"] == {
            "hidden_size": {"old": 64, "new": 48},
            "intermediate_size": {"old": 128, "new": 96},
        }
        assert found["parameters"] == {"before": 86_720, "after": 55_824}
        assert found["proof"] == {"tensors": 1, "numbers": 8 * tiny.VOCAB}
        assert found["copied"]["files"] == ["tokenizer.json", "tokenizer_config.json"]
        assert [step["step"] for step in found["steps"]] == [1, 2]
        assert list(found["perplexity"]) == [HELD_OUT, SECOND_TEXT]
        assert all(list(both) == ["before", "after"] for both in found["perplexity"].values())
        assert found["settings"]["calibration"] == "text.txt"
        assert [step["refits"] is None for step in found["steps"]] == [False, False]
        for line in ("step 1/2: recovery: 2 windows", "step 2/2: recovery: 3 windows"):
            assert line in errors.splitlines()
        assert sorted(folders.content(out)) == [
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        model, info = hf.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values())
        assert (model.config.hidden_size, model.num_parameters()) == (48, 55_824)
        assert hf.AutoTokenizer.from_pretrained(out)("w3 w5")["input_ids"] == [3, 5]
        assert os.listdir(tmp_path) == ["out"]

    def test_vit_with_its_processor_in_shards_on_a_terminal(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        monkeypatch.setattr(sys, "stdout", Terminal())
        out = tmp_path / "out"
        typed = ["prune", str(models / "vit"), "--out", str(out), *QUARTER]
        assert main([*typed, "--max-shard-size", "100kb"]) == 0
        assert "a fresh process loads what was written" in terminal.getvalue()
        copied = (out / folders.PROCESSOR).read_bytes()
        assert copied == (models / "vit" / folders.PROCESSOR).read_bytes()
        assert len(list(out.glob("model-*.safetensors"))) > 1
        config = hf.AutoConfig.from_pretrained(out)
        assert (config.hidden_size, config.intermediate_size) == (48, 96)

    def test_the_card(self, capsys: Any, models: Path, tmp_path: Path, unproved: None) -> None:
        folder, out = tmp_path / "tiny-bert", tmp_path / "out"
        folders.save("bert", folder)
        (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\ntags: [x]\n---\n# A\n")
        typed = ("prune", folder, "--out", out, "--head-pruning-ratio", "1/4")
        assert shell(capsys, *typed, "--importance", "random", "--seed", 3)[0] == 0
        assert metadata_load(out / "README.md") == {
            "base_model": "tiny-bert",
            "library_name": "transformers",
            "tags": ["pruned"],
            "license": "mit",
            "language": "en",
        }
        text = (out / "README.md").read_text()
        for line in (
            "| hidden_size | 64 | 48 (a multiple of 16) |",
            "- Load it with `BertModel.from_pretrained(folder)`.",
            "| num_attention_heads | 4 | 3 |",
            "| parameters | 81,792 | 54,496 (66.6%) |",
            "| importance | `random` |",
            "| seed | `3` |",
            f"| transformers | {hf.__version__} |",
            f"| command | `tp-hf-config prune {folder} --out {out} --head-pruning-ratio 1/4 "
            "--importance random --seed 3` |",
        ):
            assert line in text.splitlines()

    def test_the_card_of_a_target(
        self, capsys: Any, models: Path, tmp_path: Path, unproved: None
    ) -> None:
        out = tmp_path / "out"
        typed = ("prune", models / "llama-gqa", "--out", out, *QUARTER, "--for", "gguf-q8_0")
        code, printed, _ = shell(capsys, *typed)
        assert code == 0
        assert "\ngguf-q8_0: 0.1 MB -> 0.0 MB (" in printed
        text = (out / "README.md").read_text().splitlines()
        assert "| intermediate_size | 128 | 96 (a multiple of 32) |" in text
        assert any(line.startswith("- Quantised as gguf-q8_0: 0.1 MB -> 0.0 MB (") for line in text)
        assert (
            "- Quantise it with `tp-hf-config export FOLDER --to gguf --out FOLDER-gguf` and "
            "llama.cpp's `llama-quantize FOLDER-gguf/model.gguf Q8_0`."
        ) in text

    def test_a_seed_decides(
        self, capsys: Any, models: Path, tmp_path: Path, unproved: None
    ) -> None:
        state = torch.random.get_rng_state()

        def result(name: str, seed: int) -> torch.Tensor:
            typed = ("prune", models / "bert", "--out", tmp_path / name, *QUARTER)
            assert shell(capsys, *typed, "--importance", "random", "--seed", seed)[0] == 0
            return logits(tmp_path / name, hf.BertModel)

        first = result("one", 1)
        assert torch.equal(first, result("two", 1))
        assert not torch.equal(first, result("three", 2))
        assert torch.equal(state, torch.random.get_rng_state())

    def test_to_a_size(self, capsys: Any, models: Path, tmp_path: Path, unproved: None) -> None:
        typed = ("prune", models / "llama-gqa", "--out", tmp_path / "out", "--steps", 2, "--json")
        _, printed, _ = shell(capsys, *typed, "--target-params", "60K", "--dtype", "bfloat16")
        found = json.loads(printed)
        planned = found["plan"]["after"]
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert model.num_parameters() == planned["parameters"] <= 60_000
        assert planned["bytes"] == 2 * planned["parameters"]
        assert model.dtype == torch.bfloat16

    @pytest.mark.parametrize("name", ["roberta", "t5"])
    def test_tasks(
        self, capsys: Any, models: Path, tmp_path: Path, unproved: None, name: str
    ) -> None:
        """Recovery brings the pruned model nearer to the unpruned one."""
        cls = type(tiny.build(name))
        original = logits(models / name, cls)

        def distance(out: str, *more: object) -> float:
            typed = ("prune", models / name, "--out", tmp_path / out, "--pruning-ratio", "0.1")
            code, _, errors = shell(capsys, *typed, "--calibration", models / "text.txt", *more)
            assert code == 0, errors
            pruned = logits(tmp_path / out, cls)
            guess, target = (one.flatten(0, -2).log_softmax(-1) for one in (pruned, original))
            kl_div = torch.nn.functional.kl_div
            return kl_div(guess, target, log_target=True, reduction="batchmean").item()

        after, before = distance("recovered", "--recover", 60), distance("cut")
        assert after < before, (after, before)

    def test_what_belongs_goes_along(
        self, capsys: Any, models: Path, tmp_path: Path, unproved: None
    ) -> None:
        folder, out = tmp_path / "model", tmp_path / "out"
        folders.save("bert", folder)
        (tmp_path / "secret").write_text("mine")
        (folder / "vocab.txt").symlink_to(tmp_path / "secret")
        (folder / "merges.txt").symlink_to("LICENSE")
        (folder / "additional_chat_templates").mkdir()
        for name in ("LICENSE", "additional_chat_templates/a.jinja", "modules.json", "run.py"):
            (folder / name).write_text(name)
        (folder / "pytorch_model.bin").write_bytes(b"old weights")
        (folder / ".cache").mkdir()
        (folder / ".cache" / "tokenizer.json").write_text("")
        _, printed, _ = shell(capsys, "prune", folder, "--out", out, *QUARTER, "--json")
        found = json.loads(printed)
        assert found["copied"]["files"] == [
            "LICENSE",
            "additional_chat_templates/a.jinja",
            "merges.txt",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert found["copied"]["not_copied"] == ["modules.json", "run.py", "vocab.txt"]
        assert (out / "merges.txt").read_text() == "LICENSE"
        assert not (out / "merges.txt").is_symlink()
        assert not {"vocab.txt", "run.py", "pytorch_model.bin"} & set(os.listdir(out))

    def test_code_that_comes_with_it(
        self, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = tmp_path / "cache"
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
        monkeypatch.setenv("HF_MODULES_CACHE", str(cache))
        folder = folders.with_code(folders.save("llama-gqa", tmp_path / "own"), tmp_path / "ran")
        typed = ("prune", folder, "--out", tmp_path / "out", *QUARTER)
        assert shell(capsys, *typed)[0] == 1
        assert not (tmp_path / "ran").exists()
        code, printed, _ = shell(capsys, *typed, "--trust-remote-code")
        assert (code, printed.splitlines()[0].split(":")[0]) == (0, "Own")
        assert "modeling_own.py" in os.listdir(tmp_path / "out")

    def test_random_weights_are_said_to_be(
        self, capsys: Any, models: Path, tmp_path: Path, unproved: None
    ) -> None:
        folder = tmp_path / "model"
        folders.save("bert", folder)
        data = json.loads((folder / "config.json").read_text())
        data["architectures"] = ["BertForSequenceClassification"]
        (folder / "config.json").write_text(json.dumps(data))
        _, printed, _ = shell(capsys, "prune", folder, "--out", tmp_path / "out", *QUARTER)
        assert (
            f"note: 2 tensors are missing from {folder} and were initialised randomly: "
            "classifier.bias, "
            "classifier.weight" in printed.splitlines()
        )
        assert "2 tensors are missing from" in (tmp_path / "out" / "README.md").read_text()

    def test_a_name_on_the_hub(self, models: Path, tmp_path: Path) -> None:
        """A model in the Hub's cache, in a process of its own without a network."""
        cached = tmp_path / "hub" / "models--us--tiny"
        (cached / "blobs").mkdir(parents=True)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("abc")
        snapshot = cached / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted((models / "llama-gqa").iterdir())):
            (cached / "blobs" / str(number)).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        typed = ["prune", "us/tiny", "--out", str(tmp_path / "out"), *QUARTER]
        done = subprocess.run(
            [sys.executable, "-m", "tp_hf_config", *typed],
            cwd=small.ROOT,
            env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "copied: tokenizer.json, tokenizer_config.json" in done.stdout.splitlines()
        assert metadata_load(tmp_path / "out" / "README.md")["base_model"] == "us/tiny"
        assert hf.AutoConfig.from_pretrained(tmp_path / "out").intermediate_size == 96

    def test_gguf(self, capsys: Any, tmp_path: Path) -> None:
        out = tmp_path / "out"
        typed = ("prune", gguf_file(), "--out", out, "--ratios", "intermediate_size=0.1", "--json")
        code, printed, errors = shell(capsys, *typed, "--importance", "magnitude", "--no-refit")
        assert code == 0, errors
        found = json.loads(printed)
        assert found["fields"] == {"intermediate_size": {"old": 1536, "new": 1408}}
        assert found["parameters"] == {"before": 134_515_008, "after": 127_879_488}
        assert found["proof"] == {"tensors": 1, "numbers": 8 * 49_152}
        assert {"chat_template.jinja", "tokenizer.json"} <= set(found["copied"]["files"])
        config = hf.AutoConfig.from_pretrained(out)
        assert (config.intermediate_size, str(config.dtype)) == (1408, "torch.float32")
        assert not hasattr(config, "quantization_config")
        ids = hf.AutoTokenizer.from_pretrained(out)("What is Bonn?")["input_ids"]
        assert ids == [1780, 314, 43542, 47]


@pytest.mark.usefixtures("unproved")
class TestSpeed:
    def test_before_and_after(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        typed = ("prune", models / "llama-gqa", *QUARTER, "--json", "--out")
        code, printed, errors = shell(capsys, *typed, tmp_path / "timed", "--measure-speed")
        assert code == 0, errors
        speed = json.loads(printed)["speed"]
        assert list(speed) == ["before", "after"]
        for measured in speed.values():
            assert measured["inputs"] == "batch 1, prompt of 32 tokens, 32 new tokens"
            assert measured["tokens_per_second"]["median"] > 0
        card = (tmp_path / "timed" / "README.md").read_text()
        assert "- Speed on cpu, 1 threads (batch 1, prompt of 32 tokens, 32 new tokens): " in card
        assert shell(capsys, *typed, tmp_path / "out")[0] == 0  # what is written is the same
        timed, out = (tmp_path / name / "model.safetensors" for name in ("timed", "out"))
        assert timed.read_bytes() == out.read_bytes()

    def test_a_model_that_reads_no_tokens(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        typed = ("prune", models / "vit", *QUARTER, "--out", tmp_path / "out", "--measure-speed")
        code, _, errors = shell(capsys, *typed)
        assert code != 0
        assert "does not run on tokens alone" in errors
        assert "Leave --measure-speed out" in errors
        assert not (tmp_path / "out").exists()


class TestCalibrated:
    """What channels carry decides which go, and the weights that read them are refitted."""

    def prune(self, capsys: Any, model: Path, out: Path, *more: object) -> tuple[Any, list[str]]:
        typed = ("prune", model, "--out", out, "--ratios", "intermediate_size=0.25", "--json")
        code, printed, errors = shell(capsys, *typed, *more)
        assert code == 0, errors
        return json.loads(printed), errors.splitlines()

    def refitted(self, found: Any) -> list[set[str]]:
        """Of each step, the weights that were refitted."""
        return [
            {layer["weight"] for layer in step["refits"]["layers"] if layer["used"]}
            for step in found["steps"]
        ]

    DOWN = frozenset(f"model.layers.{number}.mlp.down_proj.weight" for number in range(2))

    def test_a_causal_language_model_by_default(
        self, capsys: Any, models: Path, tmp_path: Path
    ) -> None:
        """Every word of the shipped text is one token here: a refit makes up for all that goes."""
        out = tmp_path / "out"
        found, errors = self.prune(capsys, models / "llama-gqa", out)
        settings = found["settings"]
        assert settings["importance"] == "auto"
        assert settings["calibration"] == "shipped text"
        assert settings["refit"] is True
        assert "calibrating: 226 windows" in errors
        assert self.refitted(found) == [self.DOWN]
        assert list(found["perplexity"]) == [SECOND_TEXT]
        before, after = found["perplexity"][SECOND_TEXT].values()
        assert after == pytest.approx(before, rel=1e-5)
        cut, _ = self.prune(capsys, models / "llama-gqa", tmp_path / "cut", "--no-refit")
        assert cut["settings"]["importance"] == "auto"
        assert cut["settings"]["refit"] is False
        assert cut["steps"][0]["refits"] is None
        assert cut["perplexity"][SECOND_TEXT]["before"] == before
        assert abs(cut["perplexity"][SECOND_TEXT]["after"] / before - 1) > 1e-3
        card = (out / "README.md").read_text().splitlines()
        for line in (
            f"- Perplexity on a second text, not used for calibration: {before:.1f} before, "
            f"{after:.1f} after.",
            "| importance | `auto` |",
            "| calibration | `shipped text` |",
            "| refit | `True` |",
        ):
            assert line in card

    def test_a_file(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """Refits are worth it on its held-out windows."""
        more = ("--calibration", models / "text.txt")
        found, _ = self.prune(capsys, models / "llama-gqa", tmp_path / "out", *more)
        assert found["settings"]["calibration"] == "text.txt"
        assert self.refitted(found) == [self.DOWN]
        shown = (tmp_path / "out" / "README.md").read_text().splitlines()
        for text in (HELD_OUT, SECOND_TEXT):
            before, after = found["perplexity"][text].values()
            assert f"- Perplexity on {text}: {before:.1f} before, {after:.1f} after." in shown

    def test_so_many_tokens(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """Of the shipped text, and of what the model writes: windows of 62 tokens."""
        found, errors = self.prune(capsys, models / "llama-gqa", tmp_path / "out", "--tokens", 620)
        assert found["settings"]["tokens"] == 620
        assert "calibrating: 11 windows" in errors
        assert [line for line in errors if line.startswith("LlamaForCausalLM on 620 tokens: ")]
        more = ("--calibration", "own", "--tokens", 620)
        _, errors = self.prune(capsys, models / "llama-gqa", tmp_path / "own", *more)
        assert "calibrating: 11 windows" in errors
        card = (tmp_path / "own" / "README.md").read_text().splitlines()
        assert "| tokens | `620` |" in card

    def test_own(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        more = ("--calibration", "own", "--importance", "activation", "--seed", 4)
        found, errors = self.prune(capsys, models / "llama-gqa", tmp_path / "out", *more)
        settings = found["settings"]
        assert (settings["importance"], settings["calibration"]) == ("activation", "own")
        assert "the model writes the text that it is calibrated on" in errors
        assert self.refitted(found) == [self.DOWN]
        assert list(found["perplexity"]) == [SECOND_TEXT]

    def test_importances_choose(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """Each its own units; refits change none of that."""

        def gone(importance: str, *more: str) -> str:
            out = tmp_path / "out"
            model = models / "llama-gqa"
            calibrated = ("--importance", importance, "--calibration", models / "text.txt")
            self.prune(capsys, model, out, "--overwrite", *calibrated, *more)
            weights = hf.AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp
            return str(weights.gate_proj.weight[:, 0].tolist())  # rows are cut, never refitted

        kinds = ("wanda", "activation", "curvature", "magnitude")
        chosen = {kind: gone(kind) for kind in kinds}
        assert len(set(chosen.values())) == len(kinds)
        assert chosen["wanda"] == gone("wanda", "--no-refit")

    def test_magnitude(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """Refitted all the same; with --no-refit the model is not run at all."""
        more = ("--importance", "magnitude")
        found, _ = self.prune(capsys, models / "llama-gqa", tmp_path / "one", *more)
        assert found["settings"]["calibration"] == "shipped text"
        assert self.refitted(found) == [self.DOWN]
        more += ("--no-refit",)
        found, errors = self.prune(capsys, models / "llama-gqa", tmp_path / "two", *more)
        assert not {"calibration", "refit"} & set(found["settings"])
        assert found["perplexity"] == {}
        assert found["steps"][0]["refits"] is None
        assert not [line for line in errors if line.startswith("calibrating")]
        assert [line for line in errors if line.startswith("warning")] == [
            "warning: --importance magnitude ranks LlamaForCausalLM by the size of its weights, "
            "which often removes what a language model needs most. Leave --importance out, or at "
            "least --no-refit"
        ]

    def test_every_step_is_measured(
        self, capsys: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second after the first step's cut and recovery."""
        measured: list[tuple[int, Any]] = []
        current = Calibration.current

        def noted(calibration: Calibration) -> Any:
            readings = current(calibration)
            if all(readings is not one for _, one in measured):
                measured.append((calibration.model.config.intermediate_size, readings))
            return readings

        monkeypatch.setattr(Calibration, "current", noted)
        more = ("--steps", 2, "--recover", 2)
        found, errors = self.prune(capsys, models / "llama-gqa", tmp_path / "out", *more)
        assert [width for width, _ in measured] == [128, 112]
        assert self.refitted(found) == [self.DOWN, self.DOWN]
        assert "step 2/2: recovery: 1 windows" in errors

    def test_a_bare_encoder(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """It has no logits; on a file it can be calibrated, as sentence encoders are."""
        more = ("--calibration", models / "text.txt")
        found, _ = self.prune(capsys, models / "bert", tmp_path / "out", *more)
        assert found["settings"]["importance"] == "auto"
        assert self.refitted(found) == [
            {f"encoder.layer.{number}.output.dense.weight" for number in range(2)}
        ]
        assert found["perplexity"] == {}

    def test_an_encoder_decoder(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        typed = ("prune", models / "t5", "--out", tmp_path / "out", "--ratios", "d_ff=0.25")
        more = ("--calibration", models / "text.txt", "--json")
        code, printed, errors = shell(capsys, *typed, *more)
        assert code == 0, errors
        found = json.loads(printed)
        assert found["settings"]["importance"] == "auto"
        sides = (("encoder", 1), ("decoder", 2))
        assert self.refitted(found) == [
            {
                f"{side}.block.{block}.layer.{number}.DenseReluDense.wo.weight"
                for side, number in sides
                for block in range(2)
            }
        ]
        assert found["perplexity"] == {}

    def test_without_a_tokenizer(self, capsys: Any, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        tiny.build("llama-gqa").save_pretrained(folder)
        typed = ("prune", folder, "--out", tmp_path / "out", "--pruning-ratio", 0.2)
        code, _, errors = shell(capsys, *typed)
        assert code == 1
        assert f"{folder}: its tokenizer cannot be loaded: " in errors
        assert "use --importance magnitude or random with --no-refit" in errors
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models with four layers; the second and the fourth of Llama change little."""
    root = tmp_path_factory.mktemp("deep")
    llama, bart = deep_zoo.build("llama"), deep_zoo.build("bart")
    with torch.no_grad():
        for number in (1, 3):
            llama.model.layers[number].self_attn.o_proj.weight.mul_(1e-3)
            llama.model.layers[number].mlp.down_proj.weight.mul_(1e-3)
    for model, name in ((llama, "llama"), (bart, "bart")):
        model.save_pretrained(root / name)
        folders.save_tokenizer(root / name)
    return root


class TestDroppedLayers:
    """Whole layers go before widths are pruned: those that change least on the text."""

    def test_layers_alone(self, capsys: Any, deep: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        typed = ("prune", deep / "llama", "--out", out, "--drop-layers", 2, "--json")
        code, printed, errors = shell(capsys, *typed)
        assert code == 0, errors
        found = json.loads(printed)
        assert found["plan"] is None
        assert found["steps"] == []
        assert found["fields"] == {"num_hidden_layers": {"old": 4, "new": 2}}
        assert found["dropped_layers"]["dropped"] == [1, 3]
        assert found["settings"]["drop_layers"] == "2"
        assert "importance" not in found["settings"]
        before, after = found["perplexity"][SECOND_TEXT].values()
        assert after == pytest.approx(before, rel=1e-2)
        assert "model.layers: 2 of 4 layers dropped (1: influence 0.000, 3: influence 0.000)" in (
            errors.splitlines()
        )
        model = hf.LlamaForCausalLM.from_pretrained(out)
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
        card = (out / "README.md").read_text().splitlines()
        for line in (
            "| num_hidden_layers | 4 | 2 |",
            "| drop_layers | `2` |",
            "- model.layers: 2 of 4 layers dropped (1: influence 0.000, 3: influence 0.000).",
        ):
            assert line in card

    def test_with_widths_and_recovery(
        self, capsys: Any, deep: Path, tmp_path: Path, unproved: None
    ) -> None:
        more = ("--ratios", "intermediate_size=0.25", "--recover", 2, "--drop-layers", "layers=1")
        code, printed, errors = shell(
            capsys, "prune", deep / "llama", "--out", tmp_path / "out", *more
        )
        assert code == 0, errors
        lines = printed.splitlines()
        assert lines[0] == (
            "LlamaForCausalLM: num_hidden_layers 4 -> 3, intermediate_size 96 -> 72"
        )
        assert lines[1].startswith("model.layers: 1 of 4 layers dropped (")
        assert len(lines) <= MOST_LINES
        assert hf.LlamaForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3

    def test_layers_and_recovery(
        self, capsys: Any, deep: Path, tmp_path: Path, unproved: None
    ) -> None:
        typed = ("prune", deep / "llama", "--out", tmp_path / "out", "--drop-layers", 1)
        code, _, errors = shell(capsys, *typed, "--recover", 2)
        assert code == 0, errors
        assert "recovery: 2 windows" in errors

    @pytest.mark.parametrize(
        ("more", "measured"),
        [
            ((), []),
            (("--ratios", "intermediate_size=0.25"), [3]),
            (
                ("--ratios", "intermediate_size=0.25", "--importance", "random", "--no-refit"),
                [],
            ),
        ],
    )
    def test_only_what_is_pruned_is_measured(
        self,
        capsys: Any,
        deep: Path,
        tmp_path: Path,
        unproved: None,
        monkeypatch: pytest.MonkeyPatch,
        more: tuple[str, ...],
        measured: list[int],
    ) -> None:
        """Influences need no Gram matrices, and of layers that go nothing else is wanted."""
        seen: list[int] = []
        measure = measured_model.measure

        def noted(model: Any, *given: Any, **named: Any) -> Any:
            if not named:  # else it is the tiny model, for the plan's bytes, unless those are known
                seen.append(model.config.num_hidden_layers)
            return measure(model, *given, **named)

        monkeypatch.setattr(measured_model, "measure", noted)
        typed = ("prune", deep / "llama", "--out", tmp_path / "out", "--drop-layers", 1, *more)
        code, _, errors = shell(capsys, *typed)
        assert code == 0, errors
        assert seen == measured
        assert ("calibrating: 226 windows" in errors.splitlines()) is bool(measured)

    def test_a_target_that_is_only_met_without_the_layers(
        self, capsys: Any, deep: Path, tmp_path: Path, unproved: None
    ) -> None:
        typed = ("prune", deep / "llama", "--out", tmp_path / "out", "--json")
        target = ("--target-params", 0.4, "--prune", "intermediate_size")
        code, _, errors = shell(capsys, *typed, *target)
        assert code == 1
        assert "target_params" in errors
        code, printed, errors = shell(capsys, *typed, *target, "--drop-layers", 2)
        assert code == 0, errors
        before, after = json.loads(printed)["parameters"].values()
        assert after / before == pytest.approx(0.4, abs=0.01)

    def test_a_field_that_is_none_is_told_before_the_model_is_read(
        self, capsys: Any, deep: Path, tmp_path: Path
    ) -> None:
        typed = ("prune", deep / "llama", "--out", tmp_path / "out", "--drop-layers", 1)
        code, _, errors = shell(capsys, *typed, "--ratios", "no_size=0.5")
        assert code == 2
        assert "LlamaForCausalLM cannot prune no_size" in errors
        assert "loading" not in errors

    def test_a_target_is_of_the_whole_model(
        self, capsys: Any, deep: Path, tmp_path: Path, unproved: None
    ) -> None:
        more = ("--target-params", 0.6, "--prune", "intermediate_size", "--drop-layers", 1)
        code, printed, errors = shell(
            capsys, "prune", deep / "llama", "--out", tmp_path / "out", *more, "--json"
        )
        assert code == 0, errors
        before, after = json.loads(printed)["parameters"].values()
        assert after / before == pytest.approx(0.6, abs=0.01)

    def test_an_encoder_decoder(
        self, capsys: Any, models: Path, deep: Path, tmp_path: Path, unproved: None
    ) -> None:
        typed = ("prune", deep / "bart", "--out", tmp_path / "out", "--calibration")
        more = (models / "text.txt", "--drop-layers")
        code, _, errors = shell(capsys, *typed, *more, 1)
        assert code == 1
        assert "has 2 lists of layers: model.encoder.layers, model.decoder.layers" in errors
        assert "in the shell --drop-layers model.encoder.layers=N" in errors
        assert os.listdir(tmp_path) == []
        code, _, errors = shell(capsys, *typed, *more, "decoder=1")
        assert code == 0, errors
        config = hf.AutoConfig.from_pretrained(tmp_path / "out")
        assert (config.encoder_layers, config.decoder_layers) == (4, 3)

    def test_more_layers_than_there_are(self, capsys: Any, deep: Path, tmp_path: Path) -> None:
        typed = ("prune", deep / "llama", "--out", tmp_path / "out", "--drop-layers", 4)
        code, _, errors = shell(capsys, *typed)
        assert code == 1
        assert "--drop-layers 4: count=4: model.layers has 4 layers, of which 1 to 3 can" in errors
        assert os.listdir(tmp_path) == []


class TestRefused:
    @pytest.mark.parametrize(
        ("code", "name", "typed", "message"),
        [
            (1, "roberta", "--recover 3", "--recover needs text to run RobertaForMaskedLM on (t"),
            (
                1,
                "bert",
                "--recover 3 --calibration {text}",
                "BertModel has no logits to recover: leave --recover out",
            ),
            (1, "vit", "--device cuda:99", "device cuda:99 cannot be used: "),
            (2, "bert", "--prune no", "BertModel cannot prune no: no such wid"),
            (2, "bert", "--out {bert} --overwrite", "bert: contains the model to be read. C"),
            (
                2,
                "bert",
                "--out {models} --overwrite",
                "contains no config.json or model.gguf; --overwrite rep",
            ),
        ],
    )
    def test_before_anything_is_written(
        self,
        capsys: Any,
        models: Path,
        tmp_path: Path,
        code: int,
        name: str,
        typed: str,
        message: str,
    ) -> None:
        before = sorted(folders.content(models))
        places = {"text": models / "text.txt", "bert": models / "bert", "models": models}
        more = typed.format(**places).split()
        common = ("prune", models / name, "--out", tmp_path / "out", *QUARTER)
        ended, printed, errors = shell(capsys, *common, *more)
        assert (ended, printed) == (code, "")
        assert message in errors
        assert errors.splitlines()[-1].startswith("tp-hf-config prune: ")
        assert "Traceback" not in errors
        assert os.listdir(tmp_path) == []
        assert sorted(folders.content(models)) == before

    def test_ratios_that_prune_nothing(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        typed = ("prune", models / "llama-gqa", "--out", tmp_path / "out")
        code, _, errors = shell(capsys, *typed, "--head-pruning-ratio", "0.01")
        assert code == 1
        assert errors == (
            "tp-hf-config prune: these ratios prune nothing (num_attention_heads 0.01 of 4). "
            "Increase the ratio\n"
        )
        assert os.listdir(tmp_path) == []

    def test_widths_that_the_class_refuses(
        self,
        capsys: Any,
        models: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        unproved: None,
    ) -> None:
        """The nearest that it takes are used, and it says so."""

        def at_least_72(_: Any, values: Any) -> Refusal | None:
            too_few = values.get(("intermediate_size",), 128) < 72
            return Refusal("at least 72") if too_few else None

        monkeypatch.setattr(Trajectory, "_ask", at_least_72)
        typed = ("prune", models / "llama-gqa", "--out", tmp_path / "out")
        code, _, errors = shell(capsys, *typed, "--pruning-ratio", "0.5")
        assert code == 0, errors
        assert hf.AutoConfig.from_pretrained(tmp_path / "out").intermediate_size == 72

    def test_weights_of_another_size(
        self, capsys: Any, models: Path, tmp_path: Path, unproved: None
    ) -> None:
        folder = tmp_path / "model"
        folders.save("bert", folder)
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, "intermediate_size": 96}))
        code, _, errors = shell(capsys, "prune", folder, "--out", tmp_path / "out", *QUARTER)
        assert code == 1
        assert (
            f"{folder}: its config does not fit its weights (see tp-hf-config check {folder}); its "
            "weights cannot be loaded: RuntimeError: "
        ) in errors
        assert os.listdir(tmp_path) == ["model"]

    def test_a_quantised_model(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folders.save("bert", folder)
        data = json.loads((folder / "config.json").read_text())
        packed = {**data, "quantization_config": {"quant_method": "gptq", "bits": 4}}
        (folder / "config.json").write_text(json.dumps(packed))
        code, _, errors = shell(capsys, "prune", folder, "--out", tmp_path / "out", *QUARTER)
        assert code == 1
        assert f"{folder} is quantised (gptq): packed weights cannot be pruned. Prune th" in errors

    def test_texts_that_teach_nothing(
        self, capsys: Any, models: Path, tmp_path: Path, unproved: None
    ) -> None:
        typed = ("prune", models / "roberta", "--out", tmp_path / "out", *QUARTER)
        for content, message in {
            b" \n": "the calibration text is empty",
            b"\xff\xfe\x00": "expected plain text in UTF-8, found another encoding at byte 0",
            b"w1 w2 w3": "the calibration text has 3 tokens, but at least 8 are needed",
        }.items():
            (tmp_path / "text").write_bytes(content)
            code, _, errors = shell(capsys, *typed, "--calibration", tmp_path / "text")
            assert code == (1 if content.startswith(b"w1") else 2)
            assert message in errors
            assert os.listdir(tmp_path) == ["text"]

    def test_a_recovery_that_diverges(
        self, capsys: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(text_module, "kl_div", lambda *_, **__: torch.tensor(float("nan")))
        typed = ("prune", models / "roberta", "--out", tmp_path / "out", *QUARTER)
        more = ("--calibration", models / "text.txt", "--recover", 2)
        code, _, errors = shell(capsys, *typed, *more)
        assert code == 1
        assert "step 1/1: recovery: the loss is nan. Load the model in float32 (--dtype" in errors
        assert os.listdir(tmp_path) == []

    def test_the_last_update_of_a_recovery(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """No loss has seen what it does: Adam's smallest divisor is 0 in float16."""
        typed = ("prune", models / "llama-gqa", "--out", tmp_path / "out", *QUARTER)
        more = ("--calibration", models / "text.txt", "--recover", 1, "--dtype", "float16")
        code, _, errors = shell(capsys, *typed, *more)
        assert code == 1
        assert "step 1/1: recovery: model.embed_tokens.weight is not finite. Load the mod" in errors
        assert os.listdir(tmp_path) == []

    def test_a_pipe_is_read_once(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """What ``--calibration <(zcat text.gz)`` gives."""
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        text = (models / "text.txt").read_text()
        writer = threading.Thread(target=pipe.write_text, args=(text,), daemon=True)
        writer.start()
        typed = ("prune", models / "llama-gqa", "--out", tmp_path / "out", *QUARTER)
        code, out, _ = shell(capsys, *typed, "--calibration", pipe)
        assert (code, "perplexity on held-out text of the calibration file: " in out) == (0, True)

    def test_another_model_than_the_one_that_was_pruned(
        self, capsys: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The proof looks at what is on the disk: one bit there is enough."""
        save = prune.save_model

        def flip(model: Any, folder: Path, shards: Any) -> tuple[str, ...]:
            notes = save(model, folder, shards)
            data = bytearray((folder / "model.safetensors").read_bytes())
            data[-1] ^= 1  # of a final norm's weight or of a head's
            (folder / "model.safetensors").write_bytes(data)
            return notes

        monkeypatch.setattr(prune, "save_model", flip)
        code, _, errors = shell(
            capsys, "prune", models / "bert", "--out", tmp_path / "out", *QUARTER
        )
        assert code == 1
        assert (
            "the model was not written, because its round trip could not be proved: BertModel: not "
            "the same as the live model" in errors
        )
        assert os.listdir(tmp_path) == []


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def killed(*_: Any, **__: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def after(step: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """Do a step, then this."""

    def both(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        then()
        return result

    return both


STEPS = {
    "loading": (prune, "load"),
    "pruning": (prune, "run_steps"),
    "saving": (prune, "save_model"),
    "copying": (prune, "copy_companions"),
    "proving": (prune, "prove_roundtrip"),
    "card": (prune, "card"),
    "flushing": (folder_module, "flush"),
}


@pytest.mark.usefixtures("unproved")
class TestWholeOrNotAtAll:
    @pytest.mark.parametrize(
        ("step", "number"), [(step, number) for number, step in enumerate(STEPS)], ids=STEPS
    )
    def test_a_fault_after_any_step(
        self,
        capsys: Any,
        models: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        step: str,
        number: int,
    ) -> None:
        """Faults take turns, and so do a new folder and one that is replaced."""
        faults = ((full_disk, 1, "No space left on device"), (interrupted, 130, "interrupted"))
        fault, code, message = faults[number % 2]
        overwrite = number % 4 < 2
        out = tmp_path / "out"
        if overwrite:
            out.mkdir()
            (out / "config.json").write_text("an older model")
        before = folders.content(tmp_path)
        place, name = STEPS[step]
        monkeypatch.setattr(place, name, after(getattr(place, name), fault))
        typed = ("prune", models / "bert", "--out", out, *QUARTER, "--overwrite")
        found, printed, errors = shell(capsys, *typed)
        assert (found, printed) == (code, "")
        assert message in errors.splitlines()[-1]
        assert folders.content(tmp_path) == before

    def test_a_full_disk_in_the_words_of_safetensors(
        self, capsys: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def half_written(_: Any, folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device")

        monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", half_written)
        typed = ("prune", models / "bert", "--out", tmp_path / "out", *QUARTER)
        code, _, errors = shell(capsys, *typed)
        assert code == 1
        assert errors.splitlines()[-1] == (
            "tp-hf-config prune: the weights cannot be written: Error while serializing: I/O "
            "error: No space left on device"
        )
        assert os.listdir(tmp_path) == []

    def test_a_polite_kill(
        self, capsys: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The process gets its signal as an exception."""
        monkeypatch.setattr(prune, "copy_companions", killed)
        typed = ("prune", models / "bert", "--out", tmp_path / "out", *QUARTER)
        with pytest.raises(SystemExit, match="143"):
            shell(capsys, *typed)
        assert os.listdir(tmp_path) == []

    def test_overwrite_replaces(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        for name in ("config.json", "stale.txt"):
            (out / name).write_text("old")
        typed = ("prune", models / "bert", "--out", out, *QUARTER)
        code, _, errors = shell(capsys, *typed)
        assert (code, sorted(os.listdir(out))) == (2, ["config.json", "stale.txt"])
        assert f"{out}: is not empty. Choose another folder, or add --overwrite" in errors
        assert shell(capsys, *typed, "--overwrite")[0] == 0
        assert hf.AutoConfig.from_pretrained(out).hidden_size == 48
        assert "stale.txt" not in os.listdir(out)
        assert os.listdir(tmp_path) == ["out"]

    def test_an_empty_folder_is_as_good_as_none(
        self, capsys: Any, models: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        typed = ("prune", models / "bert", "--out", tmp_path / "out", *QUARTER)
        assert shell(capsys, *typed)[0] == 0
        assert hf.AutoConfig.from_pretrained(tmp_path / "out").hidden_size == 48

    def test_written_meanwhile(
        self, capsys: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"

        def by_another() -> None:
            out.mkdir()
            (out / "config.json").write_text("another's")

        monkeypatch.setattr(prune, "card", after(prune.card, by_another))
        code, _, errors = shell(capsys, "prune", models / "bert", "--out", out, *QUARTER)
        assert code == 1
        assert f"{out}: is not empty." in errors
        assert folders.content(tmp_path) == {"out": b"", "out/config.json": b"another's"}


class TestNewFolder:
    """The last renames, with faults between them."""

    @pytest.fixture(autouse=True)
    def ctrl_c_as_in_a_shell(self) -> Iterator[None]:
        """What runs in the background starts with Ctrl-C ignored."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("old")
        return tmp_path / "out"

    def write(self, out: Path) -> None:
        with output.output_folder(out, overwrite=True) as work:
            (work / "config.json").write_text("new")

    def test_the_old_one_is_back_after_a_failure(
        self, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename, seen = os.rename, []

        def second_fails(one: Path, other: Path) -> None:
            seen.append(Path(other).name)
            if len(seen) == 2:
                raise OSError(errno.EIO, "Input/output error")
            rename(one, other)

        monkeypatch.setattr(os, "rename", second_fails)
        with pytest.raises(Exception, match=f"{out}: cannot be written: .*Input/output error"):
            self.write(out)
        assert [seen[1], seen[2]] == ["out", "out"]
        assert folders.content(out.parent) == {"out": b"", "out/config.json": b"old"}

    @pytest.mark.parametrize("number", [1, 2])
    def test_ctrl_c_between_them_waits(
        self, out: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        rename, seen = os.rename, []

        def then_ctrl_c(one: Path, other: Path) -> None:
            rename(one, other)
            seen.append(other)
            if len(seen) == number:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(os, "rename", then_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            self.write(out)
        assert folders.content(out.parent) == {"out": b"", "out/config.json": b"new"}

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_other_signals_wait_too(self, number: signal.Signals) -> None:
        arrived: list[int] = []
        before = signal.signal(number, lambda number, _: arrived.append(number))
        try:
            with folder_module.uninterrupted():
                signal.raise_signal(number)
                assert arrived == []
            assert arrived == [number]
        finally:
            signal.signal(number, before)

    def test_ctrl_c_again_while_tidying_up(
        self, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rmtree = folder_module.shutil.rmtree

        def with_ctrl_c(*args: Any, **kwargs: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            rmtree(*args, **kwargs)

        monkeypatch.setattr(folder_module.shutil, "rmtree", with_ctrl_c)
        with pytest.raises(KeyboardInterrupt), output.output_folder(out, overwrite=True):
            raise ZeroDivisionError
        assert folders.content(out.parent) == {"out": b"", "out/config.json": b"old"}

    def test_a_link_to_a_folder_stays_one(self, out: Path) -> None:
        link = out.with_name("link")
        link.symlink_to(out)
        self.write(link)
        assert link.is_symlink()
        assert (out / "config.json").read_text() == "new"

    def test_a_folder_that_cannot_be_written(
        self, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def denied(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", denied)
        with pytest.raises(Exception, match=r"new: cannot be written: .*Permission denied"):
            self.write(out.with_name("new"))
        assert os.listdir(out.parent) == ["out"]
