"""One pruner constructed and one magnitude step, beside a peer.

    python benchmarks/prune.py [--rounds 3] [--no-large] [--json FILE]

Seconds on the real SmolLM2-135M, the best of some rounds in turn: FFN alone, FFN with the hidden
size, and these with key/value groups.  OptiPFair (``pip install optipfair``) cuts FFNs only.
Learning and proving is done once per model and printed by itself; the first pruner of the FFN in a
fresh process, with an empty cache on disk and with that of the run before.  Then, without weights,
the same for 70 billion parameters, and a random Llama of 1.5 billion: the step as a multiple of the
time to read and write its weights once, and the peak of memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch_pruning as tp
from overhead import llama, smollm2
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tp_hf_config import HFConfigSyncHook, prunable
from tp_hf_config.graph.prunable import widths_of
from tp_hf_config.reports import dated, versions

RATIO = 0.2
FFN = ("intermediate_size",)
BOTH = ("intermediate_size", "hidden_size")
ALL = (*BOTH, "num_key_value_heads")
HIDDEN_RATIO = 3 / 16  # 576 -> 468, which six heads divide: Llama asks for that


def prune(model: PreTrainedModel, fields: tuple[str, ...]) -> tuple[float, float]:
    """Seconds to construct a pruner and to take one step."""
    ratios = {"hidden_size": HIDDEN_RATIO} if fields == ALL else None
    started = time.perf_counter()
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=RATIO,
        round_to=1,
        hooks=[HFConfigSyncHook(prune=fields, ratios=ratios)],
    )
    constructed = time.perf_counter()
    pruner.step()
    return constructed - started, time.perf_counter() - constructed


def optipfair(model: PreTrainedModel) -> float | None:
    """Seconds for OptiPFair's FFN pruning; None where it is not installed."""
    try:
        from optipfair import prune_model
    except ImportError:
        return None
    logging.getLogger("optipfair").setLevel(logging.ERROR)
    started = time.perf_counter()
    prune_model(model, pruning_percentage=100 * RATIO, show_progress=False)
    return time.perf_counter() - started


def total(result: Any) -> float:
    """Seconds in all."""
    return sum(result) if isinstance(result, tuple) else result


def on_smollm2(rounds: int) -> dict[str, Any]:
    """All rows of the first table."""
    model = smollm2()
    prunable(llama(2))  # first use of every module is not what is measured
    started = time.perf_counter()
    prunable(copy.deepcopy(model))
    figures: dict[str, Any] = {"learn and prove": time.perf_counter() - started}
    rows: dict[str, Callable[[PreTrainedModel], Any]] = {
        label: partial(prune, fields=fields)
        for label, fields in (
            ("FFN", FFN),
            ("FFN and hidden size", BOTH),
            ("FFN, hidden size and key/value groups", ALL),
        )
    }
    rows["FFN, OptiPFair"] = optipfair
    results = [
        {name: row(copy.deepcopy(model)) for name, row in rows.items()} for _ in range(rounds)
    ]
    for name in rows:
        figures[name] = min(
            (r[name] for r in results if r[name] is not None), key=total, default=None
        )
    return figures


FRESH = """
import sys, time
sys.path.insert(0, {folder!r})
from overhead import smollm2
import os
os.environ["TP_HF_CONFIG_CACHE"] = {cache!r}
import torch_pruning as tp
import tp_hf_config.planning.pruner_graph
from tp_hf_config import HFConfigSyncHook
model = smollm2()
started = time.perf_counter()
tp.pruner.MetaPruner(
    model, None, tp.importance.MagnitudeImportance(),
    hooks=[HFConfigSyncHook(prune="intermediate_size")],
)
print(time.perf_counter() - started)
"""


def in_fresh_processes(rounds: int) -> dict[str, float]:
    """Seconds to construct the first pruner of the FFN in a process; modules are loaded."""
    seconds: dict[str, list[float]] = {"empty cache": [], "cache of an earlier process": []}
    for _ in range(rounds):
        with TemporaryDirectory() as cache:
            code = FRESH.format(folder=str(Path(__file__).parent), cache=cache)
            for times in seconds.values():
                done = subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=True
                )
                times.append(float(done.stdout.split()[-1]))
    return {name: min(times) for name, times in seconds.items()}


def on_meta_70b() -> float:
    """Seconds to learn and prove a Llama of 70 billion parameters, which needs no weights."""
    config = LlamaConfig(
        num_hidden_layers=80,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    started = time.perf_counter()
    widths_of(model)
    return time.perf_counter() - started


def on_large(layers: int = 32) -> dict[str, float]:
    """A step on 1.5 billion parameters against one read and one write of them."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    with torch.no_grad():
        model = LlamaForCausalLM(config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    for parameter in model.parameters():
        parameter.detach().clone()
    copied = time.perf_counter() - started
    construct, step = prune(model, BOTH)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "parameters": size / 4,
        "read and write": copied,
        "construct": construct,
        "step": step,
        "step / read and write": step / copied,
        "peak memory over the model's": 1 + (after - before) / size,
    }


def main() -> None:
    """Measure, print two tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-large", action="store_true", help="SmolLM2 alone")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console()
    figures = on_smollm2(arguments.rounds)
    title = f"SmolLM2-135M, ratio {RATIO}, seconds; {time.strftime('%Y-%m-%d')}"
    table = Table("what", "construct", "step", "together", title=title)
    for name, value in figures.items():
        if value is not None:
            parts = value if isinstance(value, tuple) else (None, None)
            shown = [f"{part:.3f}" if part is not None else "" for part in parts]
            table.add_row(name, *shown, f"{total(value):.3f}")
    console.print(table)
    figures["fresh process"] = in_fresh_processes(arguments.rounds)
    for name, seconds in figures["fresh process"].items():
        console.print(f"first pruner of the FFN in a fresh process, {name}: {seconds:.3f} s")
    if not arguments.no_large:
        figures["learn and prove, 70 billion"] = seconds = on_meta_70b()
        console.print(f"learn and prove a Llama of 70 billion parameters: {seconds:.2f} s")
        large = figures["large"] = on_large()
        table = Table("random Llama, 32 layers, 2048 wide", "", title="the limit")
        for name, number in large.items():
            table.add_row(name, f"{number:,.0f}" if number > 1e6 else f"{number:.2f}")
        console.print(table)
    console.print(str(versions()), f"{torch.get_num_threads()} threads", sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(dated({"figures": figures})))


if __name__ == "__main__":
    main()
