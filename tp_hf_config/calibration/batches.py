"""The data that a model is measured on: the user's batches, or windows of a text."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, CalibrationWarning, warn
from ..model.surroundings import evaluating, same_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


WINDOW = 256  # tokens
_LEAST = 8  # tokens
_FOR_PERPLEXITIES = 32  # the last passages of the shipped text, never calibrated on
TOKENS = 12_288  # default for texts, and for batches without a length
ROWS = 512  # default for batches without a length that hold images or sounds
HELD_OUT = 8  # every eighth batch is held out
_MOST_HELD_OUT = 6  # batches
_FIRST = 3_072  # tokens for what hardly changes with more: gradients, products of queries and keys
_AT_ONCE = 8  # windows that the model writes in one batch
Batch = Mapping[str, Any]
_PADDING_MASKS = ("attention_mask", "features_mask", "padding_mask")
_IGNORED = -100  # label that the loss ignores; as a decoder's label it marks padding


def models_in(module: nn.Module) -> list[PreTrainedModel]:
    """Return the outermost Transformers models in a module; the module itself if it is one."""
    from transformers import PreTrainedModel

    found: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for each in module.modules():  # a module comes before its submodules
        if isinstance(each, PreTrainedModel) and each not in inside:
            found.append(each)
            inside.update(each.modules())
    return found


def is_encoder_decoder(module: nn.Module) -> bool:
    return any(
        # T5ForTokenClassification has the config of both, but no decoder
        any(name.startswith("decoder") for name in inspect.signature(each.forward).parameters)
        for each in models_in(module)
        if getattr(each.config, "is_encoder_decoder", False)
    )


def takes_token_ids(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", None) == "input_ids"


def runs_on_text(model: nn.Module) -> bool:
    """True if a model needs only token ids: no images, no decoder ids."""
    kinds = getattr(model, "input_modalities", "text")
    alone = kinds == "text" or tuple(kinds) == ("text",)
    return takes_token_ids(model) and alone and not is_encoder_decoder(model)


@dataclass(frozen=True)
class Text:
    train: Tensor  # (windows, tokens)
    held_out: Tensor  # (windows, tokens)


def shipped_text() -> str:
    return "\n\n".join(_passages()[0])


def second_text() -> str:
    return "\n\n".join(_passages()[1])


def _passages() -> tuple[list[str], list[str]]:
    text = (files(__package__) / "shipped_text.txt").read_text(encoding="utf-8")
    passages = [passage.strip("\n") for passage in text.split("\n----\n")]
    return passages[:-_FOR_PERPLEXITIES], passages[-_FOR_PERPLEXITIES:]


def windows_of(text: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Text:
    """Tokenize a text and split it into windows; some are held out."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < _LEAST:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens, but at least {_LEAST} are needed (a good "
            "choice of channels needs some thousands)"
        )
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if int(ids.max()) >= rows:
        raise CalibrationError(
            f"the tokenizer returned token id {int(ids.max())}, but the model has {rows} "
            "embeddings. Pass the tokenizer of this model"
        )
    before, after = special_tokens(tokenizer)
    size = min(window_size(model) - len(before) - len(after), len(ids))
    windows = ids[: len(ids) // size * size].view(-1, size)
    first, last = (ids.new_tensor(part).expand(len(windows), -1) for part in (before, after))
    return _split(torch.cat([first, windows, last], 1))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return what a tokenizer puts before and after a text.

    Gemma computes nothing useful without its first token, BERT expects [CLS] and [SEP].
    """
    whole, bare = (
        list(tokenizer("text", add_special_tokens=special)["input_ids"])
        for special in (True, False)
    )
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _split(windows: Tensor) -> Text:
    held_out = _held_out(len(windows))
    in_train = torch.ones(len(windows), dtype=torch.bool)
    in_train[held_out] = False
    return Text(windows[in_train], windows[held_out][:_MOST_HELD_OUT])


def _held_out(count: int) -> list[int]:
    """Return every eighth index below ``count``; if there are two to seven, the last."""
    every = min(HELD_OUT, count)
    return list(range(every - 1, count, every)) if every > 1 else []


def positions_of(model: PreTrainedModel) -> int | None:
    """Return how many positions a model's config has; None: it sets no limit (XLNet says -1)."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def window_size(model: PreTrainedModel) -> int:
    positions = positions_of(model)
    if positions is None or positions <= 2:
        return WINDOW
    return min(WINDOW, positions - 2)  # RoBERTa never uses its first two positions


def own_text(
    model: PreTrainedModel,
    tokens: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Text:
    """Let a model write at least ``tokens`` tokens, each window from a random first token.

    The tokenizer's special tokens stand before it.
    """
    start = special_tokens(tokenizer)[0] if tokenizer else []
    size = window_size(model)
    rows = max(2, -(-tokens // size))
    embeddings: Any = model.get_input_embeddings()
    generate: Any = model.generate
    written: list[Tensor] = []
    with evaluating(model), same_random_state(seed), torch.no_grad():
        first = torch.randint(embeddings.weight.shape[0], (rows, 1))
        first = torch.cat([first.new_tensor(start).expand(rows, -1), first], 1)
        for prompt in torch.split(first, _AT_ONCE):
            ids = generate(
                prompt.to(model.device),
                attention_mask=torch.ones_like(prompt).to(model.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                min_new_tokens=size - first.shape[1],
                max_new_tokens=size - first.shape[1],
                pad_token_id=0,
            )
            written += list(ids.cpu()[:, :size])
    windows = torch.stack(written)
    return _split(windows)


def writes_text(model: Any) -> bool:
    return (
        takes_token_ids(model)
        and bool(getattr(model, "can_generate", bool)())
        and not model.config.is_encoder_decoder
    )


def with_held_out(tokens: int) -> int:
    """Return how many tokens to read so that ``tokens`` remain once every eighth is held out."""
    return tokens + tokens // (HELD_OUT - 1)


def joined_texts(
    texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, tokens: int | None
) -> str:
    """Join texts, reading until they have ``tokens`` tokens; ``None``: all."""
    read: list[str] = []
    count = 0
    for text in texts:
        if not isinstance(text, str):
            raise CalibrationError(
                f"item {len(read) + 1} of the calibration data is a {type(text).__name__}, but the "
                "items before it are texts. Pass only texts, or only batches"
            )
        read.append(text)
        if tokens is not None:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            count += max(1, len(ids))
            if count >= tokens:
                break
    return "\n\n".join(read)


def split_batches(
    data: Iterable[Any],
    model: nn.Module,
    may_be_empty: bool = False,
    tokens: int | None = None,
    whole: bool = True,
) -> tuple[list[Batch], list[Batch]]:
    """Return the user's batches without padding: those to measure, and those held out.

    Unless ``whole``, reading stops after ``tokens`` tokens (default: ``TOKENS``, or ``ROWS`` rows).
    ``may_be_empty``: one rank of several may have no batch.
    """
    batches: list[Batch] = []
    count, decodes = 0, is_encoder_decoder(model)
    number = 0
    for number, given in enumerate(data, 1):  # noqa: B007
        if isinstance(given, Tensor):
            given = {_first_argument(model): given}
        if not isinstance(given, Mapping):
            raise CalibrationError(
                f"batch {len(batches) + 1} of the calibration data is a {type(given).__name__}: "
                "expected a dict of the forward pass's arguments (a tokenizer's or a processor's "
                "output), a tensor, or texts with tokenizer="
            )
        added = list(unpadded(given, decodes))
        batches += added
        count += max(1, tokens_in(added))
        most = tokens or (ROWS if all(map(_is_in_rows, batches)) else TOKENS)
        if not whole and count >= with_held_out(most) and len(batches) != 1:
            break
    if number and not batches:
        raise CalibrationError(
            f"all rows of the {number} batches are padding: attention_mask is 0 everywhere. Pass "
            "the mask that the tokenizer makes, or leave it out"
        )
    if not batches and not may_be_empty:
        raise CalibrationError(
            "the calibration data is empty. Pass at least one batch (a list, a DataLoader)"
        )
    places = _held_out(len(batches))[:_MOST_HELD_OUT]
    train = [batch for place, batch in enumerate(batches) if place not in places]
    return train, [batches[place] for place in places]


def unpadded(batch: Batch, decodes: bool) -> Iterator[Batch]:
    """Yield a batch whole or, if a mask marks padding, row by row without its padding tokens.

    They are removed along dimension 1 of every argument that is as long there as the mask; audio
    frames in a later dimension are kept. In an encoder-decoder (``decodes``), ``labels`` of -100
    are the decoder's padding unless a mask names it. If an argument has no row for each input
    (patches of all images in one tensor), the batch is yielded whole, with a warning.
    """
    masks = {
        key: value
        for key, value in batch.items()
        if key.endswith(_PADDING_MASKS) and isinstance(value, Tensor) and value.ndim == 2
        if not key.startswith("global")  # Longformer's: tokens that attend to all
    }
    labels = batch.get("labels")
    if decodes and "decoder_attention_mask" not in masks and isinstance(labels, Tensor):
        masks |= {"labels": labels != _IGNORED} if labels.ndim == 2 else {}
    if all(bool(mask.all()) for mask in masks.values()):
        yield dict(batch)
        return
    rows = len(next(iter(masks.values())))
    shared = _not_by_rows(batch, rows)
    if shared is not None:
        warn(
            f"{shared} cannot be split into the rows of its batch, so padding is measured like "
            "tokens. Pass each row as a separate batch, without padding",
            CalibrationWarning,
        )
        yield dict(batch)
        return
    of_decoder = ("decoder", "labels") if decodes else ("decoder",)
    for row in range(rows):
        single = _row_of(batch, row, rows)
        for name, mask in masks.items():
            places = mask[row].nonzero().flatten()
            if not len(places):
                break  # a row that is all padding
            cut = [
                key
                for key, value in single.items()
                if key.startswith(of_decoder) == name.startswith(of_decoder)
                if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == mask.shape[1]
            ]
            for key in cut if not all(key.endswith("mask") for key in cut) else ():
                single[key] = single[key].index_select(1, places)
        else:
            yield single


def rows_of(batch: Batch) -> Iterator[Batch]:
    """Yield a batch's rows one by one; whole, if it cannot be split or has no token ids."""
    ids = batch.get("input_ids")
    rows = len(ids) if isinstance(ids, Tensor) and ids.ndim else 1
    if rows == 1 or _not_by_rows(batch, rows) is not None:
        yield batch
        return
    yield from (_row_of(batch, row, rows) for row in range(rows))


def first_rows(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first rows, one by one: a backward pass keeps all that the forward pass made."""
    chosen: list[Batch] = []
    for row in chain.from_iterable(map(rows_of, batches)):
        if chosen and tokens_in(chosen) >= _FIRST:
            break
        chosen.append(row)
    return chosen


def _row_of(batch: Batch, row: int, rows: int) -> dict[str, Any]:
    return {
        key: value[row : row + 1]
        if isinstance(value, Tensor) and value.ndim and len(value) == rows
        else value
        for key, value in batch.items()
    }


def _not_by_rows(batch: Batch, rows: int) -> str | None:
    for key, value in batch.items():
        numbers = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        if numbers and rows > 1 and len(value) not in (1, rows):
            return key
    return None


def tokens_in(batches: Sequence[Batch]) -> int:
    """Count tokens; of images and sounds, rows."""
    return sum(
        len(_main_input(batch)) if _is_in_rows(batch) else _main_input(batch).numel()
        for batch in batches
    )


def _main_input(batch: Batch) -> Tensor:
    tensors = (value for value in batch.values() if isinstance(value, Tensor))
    ids = batch.get("input_ids")
    return ids if isinstance(ids, Tensor) else next(tensors, torch.empty(0))


def _is_in_rows(batch: Batch) -> bool:
    return _main_input(batch).is_floating_point()


def on_device(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """Move a batch to the model's device, and its floating-point inputs to the model's dtype."""
    first = next(model.parameters())

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_inference():
            value = value.clone()  # tensors of inference_mode have no version counter
        return value.to(first.device, first.dtype if value.is_floating_point() else None)

    return {key: moved(value) for key, value in batch.items()}


def _first_argument(model: nn.Module) -> str:
    name = getattr(model, "main_input_name", None)
    if isinstance(name, str):
        return name
    return next(iter(inspect.signature(model.forward).parameters))
