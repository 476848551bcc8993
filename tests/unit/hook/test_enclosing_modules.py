"""What stands around the model and says what its config says: pooling is updated, others told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
from torch import nn

from tp_hf_config import HFConfigSyncHook


def step(model: nn.Module, *fields: str) -> Any:
    hook = HFConfigSyncHook(prune=fields)
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        hooks=[hook],
    )
    pruner.step()
    return hook.last_report


def outside(name: str, kind: str, old: int, new: int, field: str = "hidden_size") -> str:
    return (
        f"{name} ({kind}) is still {old}, the old value of {field}. It is outside the Hugging "
        f"Face model, so nothing proves that it means the same. If it does, set it to {new}"
    )


# Modules around the model


class Embedder(nn.Module):
    """Keeps how wide the model in it is."""

    def __init__(self, body: Any):
        super().__init__()
        self.body, self.width = body, body.config.hidden_size


def test_a_number_around_the_model_is_told() -> None:
    model = Embedder(small.bert())
    report = step(model, "hidden_size")
    assert model.width == 32
    assert report.notes == [outside("width", "Embedder", 32, 24)]


def test_only_what_was_passed_is_looked_at() -> None:
    model = Embedder(small.bert())
    assert step(model.body, "hidden_size").notes == []
    assert step(Embedder(small.bert()), "intermediate_size").notes == []


class TestSentenceTransformers:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Any:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling, Transformer
        from transformers import BertTokenizerFast

        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
        (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
        BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
        small.bert().save_pretrained(tmp_path)
        modules = [Transformer(str(tmp_path)), Pooling(32, pooling_mode="mean")]
        return SentenceTransformer(modules=modules, device="cpu")

    def test_pooling_is_updated(self, model: Any, tmp_path: Path) -> None:
        from sentence_transformers import SentenceTransformer

        report = step(model, "hidden_size")
        assert report.fields == {"hidden_size": (32, 24)}
        assert "1.pooling_output_dimension" in report.attributes
        assert model[1].pooling_output_dimension == 24
        model.save(str(tmp_path / "pruned"))
        again = SentenceTransformer(str(tmp_path / "pruned"), device="cpu")
        assert again[1].pooling_output_dimension == 24
        assert again.encode("a b").shape == (24,)
        assert (again.encode("a b") == model.encode("a b")).all()

    def test_it_is_taken_back_where_a_write_fails(self, model: Any, monkeypatch: Any) -> None:
        inner = next(one for one in model.modules() if isinstance(one, hf.PreTrainedModel))
        before, pooling = small.state_of(inner), type(model[1])

        def broken(module: Any, key: str, value: Any) -> None:
            if (key, value) == ("pooling_output_dimension", 24):
                raise RuntimeError("no")
            nn.Module.__setattr__(module, key, value)

        monkeypatch.setattr(pooling, "__setattr__", broken)
        with pytest.raises(RuntimeError, match="no"):
            step(model, "hidden_size")
        assert {v for k, v in vars(model[1]).items() if k.endswith("dimension")} == {32}
        small.assert_same(before, small.state_of(inner))


# Fields that mirror another one


class BroadConfig(hf.PretrainedConfig):
    model_type = "broad"

    def __init__(self, breadth: int = 8, spread: int = 4, **kwargs: Any):
        self.breadth, self.spread = breadth, spread
        self.hidden_size = breadth
        super().__init__(**kwargs)


class TwiceConfig(BroadConfig):
    """Keeps its own number, which nothing derives and nothing reads."""

    model_type = "twice"

    def __init__(self, emb_size: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        if kwargs and not emb_size:
            raise ValueError("emb_size is needed")
        self.emb_size = emb_size


class Broad(hf.PreTrainedModel):
    config_class = BroadConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.embed = nn.Embedding(40, config.breadth)
        self.up = nn.Linear(config.breadth, config.spread)
        self.down = nn.Linear(config.spread, config.breadth)
        self.head = nn.Linear(config.breadth, 40)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.down(self.up(x).relu()))


class Twice(Broad):
    config_class = TwiceConfig


def test_a_field_that_the_config_makes_of_another_follows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Broad(BroadConfig(breadth=16, spread=12)).eval()
    assert model.config.hidden_size == 16
    report = step(model, "breadth")
    assert report.fields == {"breadth": (16, 12), "hidden_size": (16, 12)}
    assert report.notes == []
    model.save_pretrained(tmp_path)
    assert Broad.from_pretrained(tmp_path).config.hidden_size == 12


def test_a_field_of_the_old_value_that_nothing_reads_is_told() -> None:
    torch.manual_seed(0)
    model = Twice(TwiceConfig(breadth=16, spread=12, emb_size=16)).eval()
    report = step(model, "breadth")
    assert report.fields == {"breadth": (16, 12), "hidden_size": (16, 12)}
    assert report.notes == [
        "config.emb_size is still 16, the old value of breadth. No code of the class reads it. If "
        "it means the same, set it to 12"
    ]
