"""How a class is run is a value of one config: what was looked at before changes nothing."""

from __future__ import annotations

import copy
import sys
import weakref
from typing import Any

import pytest
import transformers as hf
from memories import forget

from tp_hf_config import prunable
from tp_hf_config.fieldmap import learn_field_map
from tp_hf_config.graph import experiments
from tp_hf_config.model.disk_cache import VARIABLE
from tp_hf_config.twin.tiny.tiny_model import TinyModel

_TOKENS = {"image_token_id": 60, "video_token_id": 61, "audio_token_id": 62}


def gemma4(audio: bool) -> Any:
    """Text alone, or text and sound: the class takes the second form of inputs then."""
    text = hf.Gemma4TextConfig(
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=0,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        num_kv_shared_layers=0,
        head_dim=8,
        global_head_dim=8,
    )
    sound = hf.Gemma4AudioConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return hf.Gemma4Config(
        text_config=text, vision_config=None, audio_config=sound if audio else None, **_TOKENS
    )


def proved(config: Any) -> dict[str, int]:
    widths = prunable(config, model_class=hf.Gemma4Model).widths
    return {width.name: width.units for width in widths if width.reason is None}


PROVED = {
    False: {
        "text_config.hidden_size": 32,
        "text_config.intermediate_size": 48,
        "text_config.num_attention_heads": 4,
        "text_config.num_key_value_heads + text_config.num_attention_heads": 2,
    },
    True: {
        "text_config.intermediate_size": 48,
        "text_config.num_attention_heads + text_config.num_key_value_heads": 2,
    },
}
"""With sound or without -> the widths that can be pruned, each in a process of its own."""


@pytest.mark.parametrize("order", [(True, False), (False, True)], ids=["sound first", "text first"])
def test_configs_of_one_class_do_not_share_a_recipe(
    order: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    forget(monkeypatch)
    assert [proved(gemma4(audio)) for audio in order] == [PROVED[audio] for audio in order]


def containers() -> dict[str, Any]:
    """The names of all dicts, lists and sets of the package's modules, and what is in each."""
    return {
        f"{module}.{name}": copy.copy(value)
        for module, loaded in list(sys.modules.items())
        if module.startswith("tp_hf_config.")
        for name, value in vars(loaded).items()
        if isinstance(value, (dict, list, set, weakref.WeakKeyDictionary)) and name[:2] != "__"
    }


def esm(intermediate_size: int) -> Any:
    """Its contacts are reached by a method beside the forward pass."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = hf.EsmConfig(
        **sizes,
        intermediate_size=intermediate_size,
        vocab_size=60,
        mask_token_id=4,
        pad_token_id=1,
    )
    return hf.EsmForMaskedLM(config).eval()


CACHES = {
    "fieldmap.learn_field_map._learned",  # by the class and the config's JSON
    "fieldmap.model_view._cached_views",  # by the module, its config and its parts
}


def test_looking_at_a_class_changes_only_caches_that_are_kept_by_all_they_depend_on() -> None:
    prunable(esm(48))  # imports modules
    model, before = esm(56), containers()
    prunable(model)
    after = containers()
    tiny = experiments.experiments_of(learn_field_map.map_of(model)).tiny
    assert isinstance(tiny, TinyModel)
    assert tiny.recipe.methods == ("predict_contacts",)
    changed = {name for name in after if after[name] != before.get(name)}
    # both have one tiny config
    changed -= {"tp_hf_config.twin.tiny.tiny_model._built"}
    assert changed == {f"tp_hf_config.{name}" for name in CACHES}
