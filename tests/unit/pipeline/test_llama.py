"""Whether a model is a Llama by another name: at the first positions, and at the last ones."""

from __future__ import annotations

from typing import Any

import pytest
import small
import tiny
import transformers as hf
import zoo

from tp_hf_config.pipeline.llama import as_llama
from tp_hf_config.pipeline.proofs import NotProvedError

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = zoo._GQA.get("max_position_embeddings", 64)
_SETTINGS: dict[str, Any] = {**zoo._GQA, "head_dim": 16, "max_position_embeddings": LENGTH}
_ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": LENGTH // 4}
SCALED: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", **_ORIGINAL},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        **_ORIGINAL,
    },
}
needs_ministral3 = pytest.mark.skipif(
    not hasattr(hf, "Ministral3Config"), reason="this Transformers has no Ministral 3"
)


def rope(scaling: dict[str, Any]) -> dict[str, Any]:
    """Settings of rotary embeddings, as this Transformers reads them."""
    if small.TRANSFORMERS < (5,):
        return {"rope_scaling": scaling, "rope_theta": 10000.0}
    return {"rope_parameters": {"rope_theta": 10000.0, **scaling}}


def built(config: Any, kind: Any) -> Any:
    model = kind(config)
    tiny.randomise(model, 0)
    return model.eval()


@pytest.mark.parametrize("scaling", SCALED)
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral"])
def test_rotary_embeddings_that_a_llama_has_are_no_difference(name: str, scaling: str) -> None:
    own = {"sliding_window": None} if name == "Mistral" else {}
    config = getattr(hf, f"{name}Config")(**_SETTINGS, **own, **rope(SCALED[scaling]))
    _, proof = as_llama(built(config, getattr(hf, f"{name}ForCausalLM")))
    assert proof.difference <= 1e-9


@needs_ministral3
@pytest.mark.parametrize(("beta", "same"), [(0.1, False), (0.0, True)])
def test_queries_that_are_scaled_from_a_position_on(beta: float, same: bool) -> None:
    """The first positions are below it."""
    settings = rope({**SCALED["yarn"], "llama_4_scaling_beta": beta})
    model = built(hf.Ministral3Config(**_SETTINGS, **settings), hf.Ministral3ForCausalLM)
    if same:
        as_llama(model)
        return
    with pytest.raises(NotProvedError, match=r"^a Llama with its weights computes something else"):
        as_llama(model)
