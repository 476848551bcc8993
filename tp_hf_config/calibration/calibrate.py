"""Measure a model on data, for importances and for refits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..arguments import Count, check_arguments
from ..errors import CalibrationError, CalibrationWarning, listed, warn
from ..graph.cut_list import stack_dim
from ..graph.rebuild import meta_copy_of
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
from .linear_ops import Consumer
from .measured import RIDGE, TEXT_RIDGE, TOKENS_PER_CHANNEL, MeasuredModel, Readings
from .passes import agreed_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Data = Iterable[Any] | str | Literal["own"] | None


class Calibration(MeasuredModel):
    """What a model's weights read on some data; made by :func:`calibrate`.

    Once pruning or training has changed the weights, it measures again on the same data.

    Attributes:
        model: the model.
        train: the batches that are measured.
        held_out: the batches that decide whether a refit is used.
        ridge: the ridge of refits, relative to the mean square of the channels.
        max_memory: bytes that the Gram matrices may take together; ``None``: half of the free
            memory.
        refits: False: Gram matrices are measured only once something asks for them.
        readings: the measured sums.
        ranks: the ranks that measure; ``train`` and ``held_out`` are this rank's.
        seconds: duration of the latest measurement.
    """

    @check_arguments
    def importance(
        self, kind: Kind = "auto", normalizer: str | None = "mean"
    ) -> CalibratedImportance:
        """Return an importance for any Torch-Pruning pruner of this model.

        Args:
            kind: ``"auto"``: what does best in ``docs/quality.md``: ``"curvature"`` for whole
                heads, ``"activation"`` for all else, and everywhere with ``refits=False`` or on
                several ranks. ``"activation"``: a channel's norm (Minitron, arXiv 2407.14679).
                ``"wanda"``: that times the norm of the weights that read it (Wanda, arXiv
                2306.11695, summed over each channel as in Wanda-sp).
                ``"curvature"``: how much the outputs react to a unit, by products of gradients on
                some 3,000 tokens and of what it carries (K-FAC; LLM Surgeon, arXiv 2312.17244).
                Whole experts are ranked by what each adds to the output of its layer, whatever the
                kind (REAP, arXiv 2510.13999).
            normalizer: as in Torch-Pruning's ``GroupMagnitudeImportance``.

        Raises:
            ValueError: ``kind`` is unknown.
        """
        return CalibratedImportance(self, kind, normalizer)

    def measure(self) -> None:
        """Measure if the weights have changed.

        Warn of inputs and experts that get too few tokens.
        """
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
        model: a Transformers model or any other module. Under FSDP2 every rank has to call this,
            with its own data; all get the same sums.
        data: batches (dicts of the forward pass's arguments, or tensors for its first argument),
            one such dict, or texts. ``None``, for causal language models only: a small text that
            ships with the package. ``"own"``: text that the model writes itself, for languages and
            domains that the shipped text lacks; real text is better. Every eighth batch, at most
            six, is held out, to decide whether refits help. Padding is ignored: tokens that a
            padding mask leaves out, and decoder tokens whose ``labels`` are -100.
        tokenizer: tokenizer of the texts; default: the one that the model's folder or repository
            has. The special tokens that it puts around a text are put around each window.
        tokens: tokens to measure (rows, of images and sounds), in addition to held-out ones.
            Reading stops after the batch with the last of them, but not after a single batch: a
            second one is held out. Default: 12,288 for texts; all of batches with a length (a list,
            a DataLoader); else (a generator, an ``IterableDataset``) 12,288 tokens or 512 rows.
        ridge: pulls refits towards the plain cut, relative to the mean square of the channels;
            default: 0.1 for causal language models, whose later text differs from the calibration
            text, else 0.01. For a weight that read fewer than 8 tokens a channel it is as many
            times stronger.
        max_memory: bytes that the Gram matrices may take together (4 x channels x channels for each
            input); more are measured in further passes. Default: half of the free memory.
        seed: seed of the text that the model writes itself.
        measure: False: only keep the data, and measure on first use; ``drop_layers(model,
            count=...)`` needs no measurement.
        refits: False: measure for importances only. If a refit or ``"curvature"`` is used later,
            another pass measures the Gram matrices, which take most of the time and memory.
        distributed: True: every process of a run has a copy of the model (DistributedDataParallel)
            and calls this; the sums over all data are added up, as always under FSDP2. Ranks may
            have different numbers of batches, or none. If all ranks have the same data, nothing is
            counted twice.

    Returns:
        The calibration. Pass its ``importance()`` to a pruner, and itself to
        ``HFConfigSyncHook(refit=...)``.

    Raises:
        CalibrationError: the data does not fit the model, is missing where it is needed, or gives
            activations that are not finite; or another rank cannot measure or does not call this.
        UnsupportedModelError: the model is a DistributedDataParallel, offloaded by accelerate, or
            sharded by something other than FSDP2.
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
    except Exception as error:  # also from the user's data: the other ranks must be told
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
    try:
        return len(data) >= 0  # a DataLoader of an IterableDataset raises
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
        with suppress(CalibrationError):  # no tokenizer: nothing before the first token
            tokenizer = tokenizer or _tokenizer_of(model)
        return own_text(running, with_held_out(tokens), seed, tokenizer)
    if not takes_token_ids(model):
        raise CalibrationError(
            f"{type(model).__name__} takes no text. Pass batches of its inputs: calibrate(model, "
            "batches)"
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
    except Exception as error:  # of any type: no tokenizer there
        raise CalibrationError(
            f"{type(model).__name__} was loaded from {place or 'nowhere'!r}, where there is no "
            "tokenizer. Pass one: calibrate(model, tokenizer=tokenizer)"
        ) from error


def _check_writes(model: Any, data: Any) -> None:
    if writes_text(model):
        return
    what = "cannot generate its own text" if data == "own" else "is not a causal language model"
    texts = ", or pass texts and a tokenizer" if runs_on_text(model) else ""
    raise CalibrationError(
        f"{type(model).__name__} {what}, so calibrate() needs data. Pass batches of its inputs: "
        f"calibrate(model, batches){texts}"
    )


def _warn_of_experts(model: nn.Module, readings: Readings) -> None:
    measured = {consumer: readings.of(consumer) for consumer in readings.leaders}
    tokens = {one: each.tokens for one, each in (measured | readings.experts).items() if each}
    for name, dim in dict.fromkeys(
        (each.parameter, each.dim) for each in tokens if each.part is not None
    ):
        parameter = model.get_parameter(name)
        parts = parameter.shape[stack_dim(parameter, dim)]
        missing = [n for n in range(parts) if not tokens.get(Consumer(name, dim, n))]
        if not missing:
            continue
        warn(
            f"{name}: no token reached {len(missing)} of {parts} experts (number "
            f"{listed(missing)}), so they are pruned without a refit, and removed first where "
            "whole experts are pruned. Pass more data, or data that reaches them",
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
        leader, statistics = min(thin, key=lambda pair: pair[1].tokens / len(pair[1].squares))
        warn(
            f"{leader.parameter} reads {len(statistics.squares):,} channels but was measured on "
            f"{statistics.tokens:,} tokens: refits need at least {TOKENS_PER_CHANNEL} tokens a "
            f"channel ({len(thin)} inputs have fewer). Pass more data, or a larger tokens=",
            CalibrationWarning,
        )
