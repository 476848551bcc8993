"""Which models may have layers that differ."""

from __future__ import annotations

import layer_zoo
import pytest
import small
import transformers as hf

from tp_hf_config import UnsupportedModelError, plan


@pytest.mark.skipif(not layer_zoo.ENTRIES, reason="no per_layer_config in this Transformers")
@pytest.mark.parametrize(
    ("module", "where"),
    [
        ("__main__", r"in a script \(__main__\)"),
        (
            "transformers_modules.own.modeling",
            r"in code that came with the model \(transformers_mod",
        ),
    ],
)
def test_a_class_that_no_saved_model_could_import(module: str, where: str) -> None:
    """The generated file would import it; in its own process that works, in no other."""
    own = type("Own", (hf.LlamaForCausalLM,), {"__module__": module})
    model = own(small.llama().config)
    with pytest.raises(UnsupportedModelError, match=rf"per_layer=True: Own is defined {where}"):
        plan(model, per_layer=True, ratios={"intermediate_size": 0.5})
    assert type(model) is own
