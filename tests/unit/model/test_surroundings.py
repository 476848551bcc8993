"""What a second thread sees while this one learns a class: what it saw before."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import small
import torch
import torch.nn.functional as F
import torch_pruning as tp
import transformers as hf
from memories import forget
from other_thread import in_another_thread
from torch import nn
from transformers import pytorch_utils

from tp_hf_config import HFConfigSyncHook, plan, prunable, supports
from tp_hf_config.model.build import DefaultDtype
from tp_hf_config.model.surroundings import no_log_lines, one_thread, replaced

LOGGER = logging.getLogger("transformers")
SHARED = [
    *((module, "__init__") for module in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d)),
    *((nn.init, name) for name in vars(nn.init) if name.endswith("_")),
    *((nn.Module, name) for name in ("__getattr__", "__call__", "named_modules", "eval", "train")),
    *((F, name) for name in ("linear", "softmax", "scaled_dot_product_attention")),
    *((torch, name) for name in ("empty", "arange", "tensor")),
    *((owner, "__repr__") for owner in (hf.PretrainedConfig, hf.GenerationConfig)),
    (copy, "deepcopy"),
    (warnings, "showwarning"),
]
"""Functions that all threads look up."""


class Lines(logging.Handler):
    """Keeps the log lines that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    LOGGER.addHandler(handler)
    yield handler
    LOGGER.removeHandler(handler)


def seen() -> dict[str, Any]:
    """What this thread sees of all that another one might change."""
    logging.getLogger("transformers.modeling_utils").warning("seen")
    config = hf.LlamaConfig(hidden_size=8, num_attention_heads=2)
    autocast = torch.autocast("cpu", enabled=False)
    generated = torch.Generator().manual_seed(1)
    return {
        "functions": [id(getattr(owner, name)) for owner, name in SHARED],
        "repr": repr(config),
        "dtype": (torch.get_default_dtype(), torch.ones(1).dtype, (torch.arange(2) / 2).dtype),
        "device": (torch.get_default_device(), torch.ones(1).device),
        "values": nn.init.normal_(torch.empty(3), generator=generated).tolist(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "threads": torch.get_num_threads(),
        "frozen": gc.get_freeze_count(),
        "collects": (gc.isenabled(), gc.get_threshold()),
        "log": (LOGGER.level, LOGGER.propagate, list(LOGGER.handlers)),
        "warnings": list(warnings.filters),
        "compiling": pytorch_utils.is_torchdynamo_compiling(),
        "autocast": isinstance(autocast, torch.autocast),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def built() -> list[Any]:
    """What this thread builds: its dtypes, its ties, and whether it has initial values."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = hf.LlamaConfig(**sizes, vocab_size=20, tie_word_embeddings=True)
    model: Any = hf.LlamaForCausalLM(config)
    weight = model.model.layers[0].mlp.up_proj.weight
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    return [weight.dtype, str(weight.device), tied, 0.01 < weight.std().item() < 0.04]


class Watched(hf.LlamaForCausalLM):
    """Calls a function whenever it is built, and whenever it runs."""

    watch: ClassVar[Callable[[str], None]]

    def __init__(self, config: Any):
        super().__init__(config)
        type(self).watch("built")

    @functools.wraps(hf.LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        type(self).watch("run")
        return super().forward(*args, **kwargs)


MAY_DIFFER: dict[Any, set[tuple[str, str]]] = {
    # it loads what it saved: Transformers sets the dtype for all threads then
    supports: {("built", "dtype"), ("built", "values"), ("built", "warnings"), ("run", "warnings")}
}


def _pruned(model: Any) -> None:
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.RandomImportance(),
        hooks=[HFConfigSyncHook(per_layer=True, prune="inner")],
    ).step()


@pytest.mark.parametrize(
    "work", [prunable, supports, lambda model: plan(model, target_params=0.8), _pruned]
)
def test_another_thread_sees_nothing_of_what_is_learned(
    work: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    forget(monkeypatch)
    gc.unfreeze()  # what imports left, of which some may die now
    monkeypatch.setattr(Watched, "watch", lambda when: None, raising=False)
    model = Watched(small.llama().config).eval()
    before, own = in_another_thread(seen), [torch.float32, "cpu", True, True]
    looks = {"built": 0, "run": 0}
    differences: list[Any] = []
    asked: list[str] = []

    def watch(when: str) -> None:
        looks[when] += 1
        if looks[when] % 5 > 1:
            return  # it takes time
        asked.append(when)
        now = in_another_thread(seen)
        differences.extend((when, key) for key in before if now[key] != before[key])
        if looks[when] % 50 == 0 and in_another_thread(built) != own:
            differences.append((when, "another model"))

    monkeypatch.setattr(Watched, "watch", watch)
    lines.texts.clear()
    work(model)
    assert set(asked) == {"built", "run"}
    assert set(differences) - MAY_DIFFER.get(work, set()) == set()
    assert lines.texts.count("seen") == len(asked)


MADE: list[Callable[[], torch.Tensor]] = [
    *(lambda name=name: getattr(torch, name)(2) for name in ("empty", "zeros", "ones", "rand")),
    lambda: nn.Linear(2, 2).weight,
    lambda: torch.tensor([[0.1, 1], [2, 3]]),
    lambda: torch.tensor([1, 2]),
    lambda: torch.tensor(True),
    lambda: torch.zeros(2, dtype=torch.float32),
    lambda: torch.zeros(2, dtype=torch.float32) / 3,
    lambda: torch.stack([torch.zeros(2, dtype=torch.float32)]),
    lambda: torch.full((2,), 0.5),
    lambda: torch.full((2,), 5),
    lambda: torch.full((2,), torch.finfo(torch.float64).min, dtype=torch.float64),
    lambda: torch.arange(3),
    lambda: torch.arange(0, 1, 0.25),
    lambda: torch.linspace(0, 1, 5),
    lambda: torch.arange(3) / 2,
    lambda: torch.arange(3).float() / 2,
    lambda: torch.arange(3).to(torch.float32),
    lambda: torch.arange(3) ** -0.5,
    lambda: torch.arange(3).bool() * 1.5,
    lambda: torch.arange(3).sin(),
    lambda: torch.arange(3).sum(),
    lambda: torch.where(torch.tensor([True, False]), 1.0, 0.0),
    lambda: torch.fft.fftfreq(4),
    lambda: torch.hann_window(4),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("number", range(len(MADE)))
def test_a_default_dtype_for_one_thread_is_torchs_own(number: int, dtype: torch.dtype) -> None:
    with DefaultDtype(dtype):
        made = MADE[number]()
        assert in_another_thread(lambda: torch.ones(1).dtype) is torch.float32
    torch.set_default_dtype(dtype)
    try:
        wanted = MADE[number]()
    finally:
        torch.set_default_dtype(torch.float32)
    assert (made.dtype, made.shape) == (wanted.dtype, wanted.shape)


LEAST = torch.finfo(torch.float64).min  # too large for float32
COMPUTED: list[Any] = [
    lambda: torch.tensor([0, 1]) * LEAST,  # TimesFM's mask of padding
    lambda: LEAST * torch.tensor([False, True]),
    lambda: torch.where(torch.tensor([True, False]), LEAST, 0.0),
    lambda: torch.where(torch.tensor([True, False]), torch.tensor(3), LEAST),
    lambda: torch.tensor([1, 2]) / torch.tensor([3, 3]),
    lambda: torch.stack([torch.tensor([1, 2]) / 3, torch.tensor([1, 2]).exp()]),
    lambda: torch.add(torch.tensor([1, 2]), other=0.1),
    lambda: torch.tensor([1, 2]).new_tensor([0.1, 2]),
]


@pytest.mark.parametrize("number", range(len(COMPUTED)))
def test_whole_numbers_are_computed_with_in_the_default_dtype(number: int) -> None:
    with DefaultDtype(torch.float64):
        made = COMPUTED[number]()
    torch.set_default_dtype(torch.float64)
    try:
        wanted = COMPUTED[number]()
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.dtype is wanted.dtype
    assert torch.equal(made, wanted)


def test_log_lines_of_one_thread_are_dropped(lines: Lines) -> None:
    logger = logging.getLogger("transformers.models")
    with no_log_lines(logging.ERROR):
        logger.warning("own")
        logger.error("own error")
        in_another_thread(lambda: logger.warning("other"))
    logger.warning("afterwards")
    assert lines.texts == ["own error", "other", "afterwards"]


def test_a_function_is_replaced_for_one_thread() -> None:
    own = vars(hf.LlamaConfig).get("__getattribute__")
    config = hf.LlamaConfig()
    with replaced(hf.LlamaConfig, "__getattribute__", lambda config, key: f"the {key}"):
        assert config.hidden_size == "the hidden_size"
        assert in_another_thread(lambda: config.hidden_size) == 4096
        kept = hf.LlamaConfig.__getattribute__
    assert kept(config, "hidden_size") == 4096
    assert config.hidden_size == 4096
    assert vars(hf.LlamaConfig).get("__getattribute__") is own


def test_a_class_is_replaced_for_one_thread() -> None:
    autocast = torch.autocast

    def other() -> Any:
        derived = type("Derived", (torch.autocast,), {})
        return type(torch.autocast("cpu")).__mro__[1], derived("cpu").device

    with replaced(torch, "autocast", lambda *given: contextlib.nullcontext()):
        assert isinstance(torch.autocast("meta"), contextlib.nullcontext)
        assert in_another_thread(other) == (autocast, "cpu")
        kept = torch.autocast
    assert torch.autocast is autocast
    assert isinstance(kept("cpu"), autocast)


def test_another_thread_computes_on_as_many_cores() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread(), one_thread():
            assert torch.get_num_threads() == 1
            assert in_another_thread(torch.get_num_threads) == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
