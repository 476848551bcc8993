"""The table of attention heads in the documentation is what its command gives."""

from __future__ import annotations

from typing import Any

import pytest
import small

# The table is that of Transformers 5; 4 knows no head_dim of ViT, writes DeepSeek-V3's
# qk_head_dim down, and lists Swin's stages in another order.
ROWS_OF_4 = {
    "DeepseekV3ForCausalLM": "| `DeepseekV3ForCausalLM` | `num_attention_heads`, "
    "`num_key_value_heads` |   |   | `v_head_dim` |   |",
    "ViTForImageClassification": "| `ViTForImageClassification` |   |   | `hidden_size`, "
    "`num_attention_heads` |   |   |",
    "SwinForImageClassification": "| `SwinForImageClassification` |   |   |   |   | num_heads[0]: "
    "units are not interchangeable in self.relative_position_bias_table |",
}
PAGE = (small.ROOT / "docs" / "recipes" / "heads.md").read_text()


def command() -> Any:
    return small.module_of(small.ROOT / "benchmarks" / "head_modes.py")


@pytest.mark.full
def test_the_table_is_what_the_command_gives() -> None:
    module = command()
    assert PAGE.count(module.BEGIN) == PAGE.count(module.END) == 1
    written = module.between_marks(PAGE).splitlines()
    for line, made in zip(written, module.table().splitlines(), strict=True):
        row = ROWS_OF_4.get(line.split("`")[1]) if "`" in line else None
        assert made == (row if row and small.TRANSFORMERS < (5,) else line)
