"""The smallest models that show what a test is about."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch_pruning as tp
import transformers as hf
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    Phi3Config,
    Phi3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tp_hf_config import HFConfigSyncHook
from tp_hf_config.fieldmap.model_view import view_of
from tp_hf_config.graph.rebuild import meta_copy_of
from tp_hf_config.planning.selection import _inside, _sharing_nothing

TRANSFORMERS = tuple(int(part) for part in hf.__version__.split(".")[:2])
TORCH = tuple(int(part) for part in version("torch").split(".")[:2])
TORCH_PRUNING = tuple(int(part) for part in version("torch-pruning").split(".")[:2])
"""Versions, for what differs: ``TRANSFORMERS >= (5,)``."""


def inside(model: nn.Module) -> tuple[str, ...]:
    """Fields of all proved widths inside a model, the hidden size too; none share a dimension."""
    view = view_of(meta_copy_of(model), weights=False)
    proved = [width for width in _inside(view) if width.reason is None]
    return tuple(name for width in _sharing_nothing(proved, ())[0] for name in width.names)


def split(**settings: Any) -> tuple[HFConfigSyncHook, dict[str, Any]]:
    """A hook with those of these settings that are a hook's, and the others: the pruner's."""
    names = inspect.signature(HFConfigSyncHook).parameters
    of_hook = {name: settings.pop(name) for name in list(settings) if name in names}
    return HFConfigSyncHook(**of_hook), settings


ROOT = Path(__file__).resolve().parents[2]


class _Llama4(hf.LlamaForCausalLM):
    """Transformers 4 checks no widths of Llama; this one refuses what that of 5 refuses."""

    def __init__(self, config: Any):
        hidden, heads = config.hidden_size, config.num_attention_heads
        if hidden % heads:
            raise ValueError(
                "Class validation error for validator 'validate_architecture': ValueError: The "
                f"hidden size ({hidden}) is not a multiple of the number of attention heads "
                f"({heads})."
            )
        super().__init__(config)


_Llama4.__name__ = hf.LlamaForCausalLM.__name__
LlamaForCausalLM = hf.LlamaForCausalLM if TRANSFORMERS >= (5,) else _Llama4


def module_of(path: Path) -> ModuleType:
    """Run a Python file that is in no package, such as a benchmark, and return its module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # as if it were run
        spec.loader.exec_module(module)
    return module


def mlp() -> nn.Sequential:
    """No Hugging Face model: what Torch-Pruning alone prunes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def pruner_of(model: nn.Module, cls: Any = None, **kwargs: Any) -> Any:
    """A pruner of ``mlp()`` whose last layer stays."""
    cls = tp.pruner.MetaPruner if cls is None else cls
    kwargs = {"pruning_ratio": 0.5, "ignored_layers": [model[4]], **kwargs}
    return cls(model, torch.rand(1, 8), importance=tp.importance.MagnitudeImportance(), **kwargs)


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()


def bert(**changes: Any) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**{**_BERT, **changes})).eval()


def roberta(**changes: Any) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**{**_BERT, **changes})).eval()


def phi3(**changes: Any) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    return Phi3ForCausalLM(Phi3Config(**{**values, **changes})).eval()


_BERT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a sync may change in a Hugging Face model, copied: for comparing with ``same``."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {
        "configs": {
            name: (id(module.config), module.config.to_dict())
            for name, module in model.named_modules()
            if hasattr(module, "config")
        },
        "attributes": {
            f"{name}.{key}": value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, bool, type(None), tuple))
        },
        "identities": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two results of ``state_of`` are alike, values bit for bit."""
    for part in ("configs", "attributes", "identities"):
        assert before[part] == after[part]
    assert before["values"].keys() == after["values"].keys()
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name


def assert_equal_weights(model: nn.Module, other: nn.Module) -> None:
    """Two models have the same parameters and saved buffers, bit for bit."""
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def python(code: str, timeout: float = 120) -> str:
    """Run code in a fresh interpreter that can import the library; its standard output."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
