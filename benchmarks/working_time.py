"""How long calibrating and a step with refits take, and what `plan` says of it.

A random Llama of each size is measured on random tokens, then its feed-forward widths lose a fifth,
with refits.  `plan` estimates both from the operations in them and one rate; the table shows what
rate each measurement would give, and what the estimate is at the default number of tokens.

    python benchmarks/working_time.py
    python benchmarks/working_time.py --sizes 135M --tokens 2048
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
import torch_pruning as tp
from transformers import LlamaConfig, LlamaForCausalLM

from tp_hf_config import HFConfigSyncHook, calibrate, plan
from tp_hf_config.planning.plan import RATE


@dataclass(frozen=True)
class Size:
    """A Llama, and how many tokens it is measured on; ``None``: it is estimated alone."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tokens: int | None = None

    def config(self) -> LlamaConfig:
        """Return its config."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.vocabulary < 100_000,
            architectures=["LlamaForCausalLM"],
        )


SIZES = {
    "135M": Size(576, 1536, 30, 9, 3, 49152, 12_288),
    "270M": Size(1024, 2816, 20, 16, 4, 49152, 6_144),
    "1B": Size(2048, 8192, 16, 32, 8, 49152, 1_024),
    "8B": Size(4096, 14336, 32, 32, 8, 128256),
}


def main() -> None:
    """Measure and estimate every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tokens", type=int, help="to measure each size on")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; plan computes with {RATE / 1e9:.0f} GFLOPs a second")
    for name in args.sizes:
        size = SIZES[name]
        tokens = size.tokens and (args.tokens or size.tokens)
        planned = plan(size.config(), prune="intermediate_size", pruning_ratio=0.2)
        print(f"{name}: {planned.time}, on 12,288 tokens, as plan estimates", flush=True)
        if tokens:
            measured = measure(size, tokens)
            print(f"{name}: {measured}", flush=True)


def measure(size: Size, tokens: int) -> str:
    """Calibrate a random model, and prune it with refits; what it took."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(size.config()).eval()
    rows = torch.randint(3, size.vocabulary, (max(2, tokens * 8 // 7 // 256), 1, 256))
    started = time.perf_counter()
    calibration = calibrate(model, list(rows))
    calibrated = time.perf_counter()
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=calibration.importance(),
        pruning_ratio=0.2,
        hooks=[HFConfigSyncHook(prune="intermediate_size", refit=calibration)],
    )
    began = time.perf_counter()
    pruner.step()
    ended = time.perf_counter()
    held_out = sum(batch["input_ids"].numel() for batch in calibration.held_out)
    return (
        f"{calibrated - started:.1f} s to calibrate on {calibration.tokens:,} tokens, "
        f"{ended - began:.1f} s for the step, with {held_out:,} held out"
    )


if __name__ == "__main__":
    main()
