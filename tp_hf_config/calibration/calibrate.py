"""Measure a model on data, for importances and for refits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..arguments import Count, check_arguments
from ..errors import CalibrationError, CalibrationWarning, listed, warn
from ..graph.edits import stack_dim
from ..graph.meta_copy import meta_copy_of
from ..model.locate import check_has_data, check_plain, check_unwrapped
from ..model.sharded import behind
from .batches import (
    TOKENS,
    Batch,
    Text,
    joined_texts,
    models_in,
    own_text,
    runs_on_text,
    shipped_text,
    split_batches,
    takes_token_ids,
    window_size,
    windows_of,
    with_held_out,
    writes_text,
)
from .importance import CalibratedImportance, Kind
from .measured import RIDGE, TEXT_RIDGE, MeasuredModel
from .passes import agreed_ranks
from .readings import TOKENS_PER_CHANNEL, Readings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Data = Iterable[Any] | str | Literal["own"] | None


class Calibration(MeasuredModel):
    """What a model's weights read on some data; :func:`calibrate` makes it.

    It measures again by itself, on the same data, once the model's weights have changed (after a
    pruning step, after training).
    """

    @check_arguments
    def importance(
        self, kind: Kind = "wanda", normalizer: str | None = "mean"
    ) -> CalibratedImportance:
        """Return an importance for any Torch-Pruning pruner of this model.

        Args:
            kind: how channels are ranked. ``"wanda"``: the norm of what a channel carries times the
                norm of the weights that read it (Wanda, arXiv 2306.11695, summed over each channel
                as in Wanda-sp). ``"activation"``: the first factor alone (Minitron, arXiv
                2407.14679). ``"flap"``: the channel's variance times the squared norm of those
                weights (FLAP, arXiv 2312.11983). ``"obs"``: channels go one block after the other,
                those first whose loss costs least once the others are refitted (SlimGPT, arXiv
                2412.18110; OSSCAR, arXiv 2403.12983).
            normalizer: as for Torch-Pruning's ``GroupMagnitudeImportance``.

        Raises:
            ValueError: ``kind`` is unknown.
        """
        return CalibratedImportance(self, kind, normalizer)

    def measure(self) -> None:
        """Measure what weights read; warn of inputs that the data tells too little about."""
        readings = self.current()
        if self.refits:
            _warn_of_few_tokens(readings)
        _warn_of_experts(self.model, readings)


@check_arguments
def calibrate(
    model: nn.Module,
    data: Data = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: Count | None = None,
    ridge: float | None = None,
    max_memory: Count | None = None,
    seed: int = 0,
    measure: bool = True,
    refits: bool = True,
    distributed: bool = False,
) -> Calibration:
    """Measure what a model's weights read, in one pass over data.

    Args:
        model: any model: one of Transformers, or a plain module. Under FSDP2 every rank has to call
            this: each runs the sharded model on its own data, and all have the same sums
            afterwards.
        data: batches (dicts of the forward pass's arguments, or tensors for its first one), one
            such dict, or texts. For a causal language model it may be left out: a small text that
            ships with the package is taken then; ``"own"``: what the model writes itself, for
            languages and domains that the shipped text does not know (it is worth less than real
            text). Every eighth batch is held out, eight at most, to tell whether refits are any
            good. Padding is left out: what a padding mask does not name, and decoder tokens whose
            ``labels`` are -100.
        tokenizer: for texts; default: that of the folder or the repository that the model came
            from.
        tokens: how many tokens to measure, beside those held out; of images and sounds, how many
            rows. Data is read no further, but for the batch that has the last of them, and a second
            one to hold out. Default: 12,288 of texts; batches with a length (a list, a DataLoader)
            whole; of those without (a generator, an ``IterableDataset``) 12,288, or 512 rows.
        ridge: how strongly refits stay with the plain cut, relative to what channels carry;
            default: 0.1 for causal language models, which meet other text than they were measured
            on, else 0.01.
        max_memory: how many bytes Gram matrices may take together (4 x channels x channels for
            every input); what does not fit takes further passes. Default: half of what is free.
        seed: of what the model writes itself.
        measure: False: hold the data only. What weights read is measured once something asks for
            it, which ``drop_layers(model, count=...)`` does not.
        refits: False: the calibration is for importances alone. What refits and ``"obs"`` need
            beside (the Gram matrices, most of the time and memory) takes another pass then,
            once something asks for it.
        distributed: True: every process of a run has a copy of the model (DistributedDataParallel),
            all of them call this, and what they measure of their own data is added up. Under FSDP2
            it always is. Ranks may have different numbers of batches, or none. If all have the same
            data, each measures all of it, and nothing is counted twice.

    Returns:
        The calibration: its ``importance()`` is for pruners, itself for
        ``HFConfigSyncHook(refit=...)``.

    Raises:
        CalibrationError: the data does not fit the model, there is none where it is needed, or
            activations are not finite; of several ranks, one cannot measure or does not come.
        UnsupportedModelError: the model is a DistributedDataParallel, offloaded by accelerate, or
            sharded by something else than FSDP2.
    """
    check_unwrapped(model)
    model = meta_copy_of(model)
    check_has_data(model)
    for inner in models_in(model):
        check_plain(inner)
    if ridge is None:
        ridge = TEXT_RIDGE if writes_text(model) else RIDGE
    train, held_out = list[Batch](), list[Batch]()
    failure: Exception | None = None
    empty = distributed or behind(model) is not model
    try:
        train, held_out = _batches_of(model, data, tokenizer, tokens, seed, may_be_empty=empty)
    except Exception as error:  # also of the user's data; the other ranks have to know
        failure = error
    settings = {"ridge": ridge, "max_memory": max_memory}
    ranks = agreed_ranks(model, [*train, *held_out], settings, distributed, failure)
    calibration = Calibration(model, train, held_out, ridge, max_memory, ranks, refits)
    if measure:
        calibration.measure()
    return calibration


def _batches_of(
    model: Any,
    data: Data,
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: int | None,
    seed: int,
    may_be_empty: bool,
) -> tuple[list[Batch], list[Batch]]:
    if isinstance(data, Mapping) or (isinstance(data, str) and data != "own"):
        data = [data]
    given: Any = data
    sized, texts = _has_length(data), True
    if data is None or isinstance(data, str):
        _check_writes(model, data)
    else:
        items = iter(data)
        first = list(islice(items, 1))
        given, texts = chain(first, items), bool(first) and isinstance(first[0], str)
    if texts:
        text = _text_of(model, given, tokenizer, tokens or TOKENS, seed, sized)
        wanted = max(1, (tokens or TOKENS) // text.train.shape[1])
        train: list[Batch] = [{"input_ids": row[None]} for row in text.train[:wanted]]
        held_out: list[Batch] = [{"input_ids": row[None]} for row in text.held_out]
    else:
        whole = sized and tokens is None
        train, held_out = split_batches(given, model, may_be_empty, tokens, whole)
    return train, held_out


def _has_length(data: Any) -> bool:
    """True if data says how many items it has, so it ends; a ``DataLoader`` may raise instead."""
    try:
        return len(data) >= 0
    except TypeError:
        return False


def _text_of(
    model: Any,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: int,
    seed: int,
    whole: bool,
) -> Text:
    if data == "own":
        running: Any = behind(model)
        return own_text(running, with_held_out(tokens), seed)
    if not takes_token_ids(model):
        raise CalibrationError(
            f"{type(model).__name__} takes no text: pass batches of what it takes, "
            "calibrate(model, batches)"
        )
    tokenizer = tokenizer or _tokenizer_of(model)
    most = None if whole else with_held_out(tokens) + window_size(model)
    text = shipped_text() if data is None else joined_texts(data, tokenizer, most)
    return windows_of(text, tokenizer, model)


def _tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    place = getattr(model.config, "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(place)  # type: ignore[no-any-return]
    except Exception as error:  # whatever it raises for what it does not find
        raise CalibrationError(
            f"{type(model).__name__} was read from {place or 'nowhere'!r}, where there is no "
            "tokenizer: pass calibrate(model, tokenizer=...)"
        ) from error


def _check_writes(model: Any, data: Any) -> None:
    if writes_text(model):
        return
    what = "cannot write text of its own" if data == "own" else "is no causal language model"
    texts = ", or texts and a tokenizer" if runs_on_text(model) else ""
    raise CalibrationError(
        f"{type(model).__name__} {what}, so it needs data: pass batches of what it takes, "
        f"calibrate(model, batches){texts}"
    )


def _warn_of_experts(model: nn.Module, readings: Readings) -> None:
    """Warn of experts that no token of the data reached: they are cut as ever, not refitted."""
    for (name, dim), consumers in readings.by_place().items():
        reached = {consumer.part for consumer in consumers}
        if None in reached:
            continue
        parameter = model.get_parameter(name)
        parts = parameter.shape[stack_dim(parameter, dim)]
        missing = [part for part in range(parts) if part not in reached]
        if not missing:
            continue
        warn(
            f"{name}: no token reached {listed(missing)} of {parts} experts, so "
            "they are cut without a refit. Pass more data, or data that reaches them",
            CalibrationWarning,
        )
        return


def _warn_of_few_tokens(readings: Readings) -> None:
    thin = [
        (leader, statistics)
        for leader, statistics in readings.statistics.items()
        if readings.needs_gram(leader) and not statistics.is_enough
    ]
    if thin:
        leader, statistics = min(thin, key=lambda pair: pair[1].tokens / len(pair[1].total))
        warn(
            f"{leader.parameter} reads {len(statistics.total):,} channels and got "
            f"{statistics.tokens:,} tokens: refits want {TOKENS_PER_CHANNEL} a channel or more "
            f"({len(thin)} inputs have fewer). Pass more data, or tokens=",
            CalibrationWarning,
        )
