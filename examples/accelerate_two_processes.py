"""Prune while two processes train together: they agree on what goes, and one saves.

DistributedDataParallel averages the gradients over the processes, so an importance made of weights
and gradients (Taylor) is the same in all of them, and so is what a pruner takes out.  It holds on
to the Parameters that it was given, though: the model is wrapped anew after every pruning step.
The optimizer's moments follow the weights (`optimizer_follows`).

    pip install . accelerate
    python examples/accelerate_two_processes.py

Starts its two processes itself, on the CPU (gloo), and trains a tiny random Llama; a checkpoint of
your own with `--model FOLDER`, other processes with `accelerate launch`.  What it claims it checks,
in every process, and it stops where that does not hold.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
import torch_pruning as tp
from accelerate import Accelerator, debug_launcher
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from tp_hf_config import HFConfigSyncHook, optimizer_follows

BATCH, LENGTH = 4, 16
TINY = LlamaConfig(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)


def main() -> None:
    """Start the processes, unless this is one already."""
    args = parse_args()
    if "WORLD_SIZE" in os.environ:
        worker(args)
        return
    args.out = args.out or tempfile.mkdtemp(prefix="two-processes-")
    debug_launcher(worker, (args,), num_processes=2)


def worker(args: argparse.Namespace) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(args.seed)  # the same model in all processes, and the same data to share out
    model = load(args.model)
    number = (args.steps + 1) * args.every * BATCH * accelerator.num_processes
    batches = DataLoader(torch.randint(model.config.vocab_size, (number, LENGTH)), BATCH)
    hook = HFConfigSyncHook(prune=("hidden_size", "intermediate_size"))
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=args.ratio,
        iterative_steps=args.steps,
        hooks=[hook],
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapped, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    for step, batch in enumerate(batches, start=1):
        loss = wrapped(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)  # from here on all processes have the same gradients
        optimizer.step()
        if step % args.every == 0 and pruner.current_step < args.steps:
            with optimizer_follows(model, optimizer):
                pruner.step()
            agree("what was pruned", pruner.pruning_history())
            if accelerator.is_main_process:
                print(hook.last_report)
            accelerator.free_memory()  # lets go of the wrapper and its Parameters
            wrapped = accelerator.prepare(model)
        optimizer.zero_grad()
    agree("the weights", fingerprint(model))
    check_saved(accelerator, model, args.out or "two-processes")


def load(folder: str | None) -> PreTrainedModel:
    """A checkpoint, or a tiny random model."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder)
    return AutoModelForCausalLM.from_config(TINY)


def agree(what: str, mine: object) -> None:
    """Stop unless all processes have the same."""
    everyone = gather_object([mine])
    if any(other != mine for other in everyone):
        raise RuntimeError(f"the processes disagree on {what}")


def fingerprint(model: PreTrainedModel) -> list[float]:
    """Two numbers for each weight that hardly two different weights share."""
    weights = [parameter.detach().double() for parameter in model.parameters()]
    return [float(value) for weight in weights for value in (weight.sum(), weight.square().sum())]


@torch.no_grad()
def check_saved(accelerator: Accelerator, model: PreTrainedModel, folder: str) -> None:
    """One process saves; all load that and have the outputs of the model that they trained."""
    if accelerator.is_main_process:
        model.save_pretrained(folder)
    accelerator.wait_for_everyone()
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(LENGTH)[None]
    trained, again = model.eval()(tokens).logits, loaded(tokens).logits
    if not torch.equal(trained, again):
        raise RuntimeError("the checkpoint is another model than that which was trained")
    agree("the outputs", trained.tolist())
    if accelerator.is_main_process:
        print(
            f"{accelerator.num_processes} processes agree: hidden size {model.config.hidden_size}, "
            f"FFN {model.config.intermediate_size}; the checkpoint has the outputs of the trained "
            f"model: {folder}"
        )


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a checkpoint's folder (default: a tiny random Llama)")
    parser.add_argument("--out", help="where to save (default: a new temporary folder)")
    parser.add_argument("--ratio", type=float, default=0.25, help="how much to prune")
    parser.add_argument("--steps", type=int, default=2, help="pruning steps")
    parser.add_argument("--every", type=int, default=3, help="training steps before each")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
