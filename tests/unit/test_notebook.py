"""Plans, widths and reports in a notebook: tables where shown, one short line elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import model_folders
import nbformat
import pytest
import torch_pruning as tp
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from tp_hf_config import HFConfigSyncHook, plan, prunable
from tp_hf_config.checkpoint.reports import (
    Cause,
    CheckReport,
    RepairReport,
    RoundtripReport,
)
from tp_hf_config.graph.prunable import Width
from tp_hf_config.hook.report import PrunedGroup, PrunedLayer, SyncReport
from tp_hf_config.pipeline.support import Support, WidthSupport

pytestmark = pytest.mark.usefixtures("every_width")

CELLS = (
    """
    import torch_pruning as tp
    from transformers import AutoModelForCausalLM
    from tp_hf_config import HFConfigSyncHook, check_checkpoint, plan, prunable
    model = AutoModelForCausalLM.from_pretrained("my-llm")
    prunable(model)
    """,
    "plan(model, pruning_ratio=0.25)",
    """
    hook = HFConfigSyncHook(prune="inner")
    pruner = tp.pruner.MetaPruner(
        model, example_inputs=None, importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25, hooks=[hook],
    )
    pruner.step()
    hook.last_report
    """,
    "model.save_pretrained('pruned'); check_checkpoint('pruned')",
    "prunable(model).widths",
)
UNITS = ["config field", "units", "groups", "layers", "parameters a unit", "proof"]
PROVED = "units permuted: same outputs"


class Tables(HTMLParser):
    """The tables of a page, row by row."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[list[list[str]]] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.found.append([])
        elif tag == "tr":
            self.found[-1].append([])
        elif tag in ("td", "th"):
            self.found[-1][-1].append("")
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found[-1][-1][-1] += data


def tables(shown: Any) -> list[list[list[str]]]:
    return Tables(shown._repr_html_()).found


def test_a_notebook_shows_tables(tmp_path: Path) -> None:
    model_folders.save("llama-gqa", tmp_path / "my-llm")
    cells = [nbformat.v4.new_code_cell("\n".join(map(str.strip, c.split("\n")))) for c in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", resources=where, timeout=300).execute()
    page, _ = HTMLExporter().from_notebook_node(notebook)
    widths, planned = Tables(page).found
    assert widths[0] == UNITS
    assert widths[2:4] == [
        ["hidden_size", "64", "1", "21", "1,355", PROVED],
        ["intermediate_size", "128", "2", "6", "384", PROVED],
    ]
    assert [row[:3] for row in planned] == [
        ["config field", "now", "planned"],
        ["intermediate_size", "128", "96"],
    ]
    assert "<p>parameters: 86,720 -&gt; 74,432 (85.8%)</p>" in page
    assert "intermediate_size 128 -&gt; 96</b></p>" in page
    assert "pruned: sound" in page
    last = cells[-1].outputs[-1]["data"]
    assert set(last) == {"text/plain"}  # a tuple: the short form of each
    assert "Width(intermediate_size: 96 units in 2 groups, proved)" in last["text/plain"]


@pytest.fixture(scope="module")
def step() -> Any:
    model = model_folders.tiny.build("llama-gqa")
    hook = HFConfigSyncHook(prune=("hidden_size", "intermediate_size"))
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        hooks=[hook],
    )
    pruner.step()
    return hook


REFUSED = Width((("head_dim",),), reason="units are not interchangeable in " + "q_proj " * 40)
CHECKED = CheckReport(
    "<b>us</b>",
    "LlamaForCausalLM",
    False,
    causes=(
        Cause("field", "intermediate_size says 96, ...", "intermediate_size", 96, 128, ("t",) * 99),
        Cause("tensors", "lm_head.weight is missing", tensors=("lm_head.weight",)),
    ),
    notes=("a & b",),
)
REPAIRED = RepairReport("us", {"pad_token_id": (None, 0)}, "--- a\n+++ b\n-<1>\n", True, "bak")
SUPPORT = Support(
    "LlamaForCausalLM",
    (WidthSupport(("head_dim",), "refused", "why"), WidthSupport(("hidden_size",), "works")),
)
GROUP = PrunedGroup((PrunedLayer("fc1", True, 999, 2000),) * 50)


class TestShortForms:
    @pytest.mark.parametrize(
        ("shown", "said"),
        [
            (REFUSED, "Width(head_dim: units are not interchangeable in q_proj q_proj "),
            (CHECKED, "CheckReport(<b>us</b>: not sound)"),
            (CHECKED.causes[0], "Cause(intermediate_size says 96, ...)"),
            (REPAIRED, "RepairReport(us: repaired)"),
            (
                RoundtripReport("us", "Llama", False, against="them"),
                "RoundtripReport(us: not the same as them (Llama, fresh process))",
            ),
            (SUPPORT, "Support(LlamaForCausalLM: 1 of 2 widths works)"),
            (Support("Own", why_not="no inputs"), "Support(Own: not tested: no inputs)"),
            (SyncReport(2, error="no " * 99), "SyncReport(sync 2: 0 groups pruned; the config "),
            (GROUP, "PrunedGroup(999 of 2,000 output channels of fc1, in 50 layers)"),
            (GROUP.root, "PrunedLayer(999 of 2,000 output channels of fc1)"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_of(self, shown: Any, said: str) -> None:
        assert repr(shown).startswith(said)
        assert len(repr(shown)) < 230
        assert "\n" not in repr(shown)

    def test_of_what_a_step_did(self, step: Any) -> None:
        assert repr(step.last_report) == (
            "SyncReport(sync 1: 3 groups pruned (config graph); hidden_size 64 -> 48, "
            "intermediate_size 128 -> 96)"
        )

    def test_of_widths_and_a_plan(self) -> None:
        model = model_folders.tiny.build("llama-gqa")
        found = prunable(model)
        assert repr(found) == "Prunable(LlamaForCausalLM: 4 of 6 widths proved)"
        assert repr(found.widths[1]) == "Width(hidden_size: 64 units in 1 group, proved)"
        assert len(repr(found.widths[1].groups[0])) < 130
        planned = plan(model, pruning_ratio=0.25)
        assert repr(planned) == ("Plan(LlamaForCausalLM: 2 widths, 86,720 -> 55,824 parameters)")
        assert repr(planned.widths[0]) == "PlannedWidth(hidden_size: 64 -> 48)"


class TestTables:
    def test_of_one_width(self) -> None:
        assert tables(REFUSED) == [[UNITS, ["head_dim", "", "", "", "", REFUSED.reason]]]

    def test_of_a_folder_that_is_not_sound(self) -> None:
        assert CHECKED._repr_html_() == (
            "<p><b>&lt;b&gt;us&lt;/b&gt;: not sound</b></p>"
            "<p>LlamaForCausalLM: 0 tensors, 0 parameters, 0 files</p>"
            "<p>intermediate_size says 96, ...</p><p>lm_head.weight is missing</p>"
            "<p>note: a &amp; b</p>"
        )

    def test_of_a_repair(self) -> None:
        shown = REPAIRED._repr_html_()
        assert "<p>pad_token_id: not set -&gt; 0</p>" in shown
        assert "<pre>--- a\n+++ b\n-&lt;1&gt;\n</pre>" in shown

    def test_of_support(self) -> None:
        assert tables(SUPPORT) == [
            [
                ["config field", "outcome", "why"],
                ["head_dim", "refused", "why"],
                ["hidden_size", "works", ""],
            ]
        ]
        assert "no inputs" in Support("Own", why_not="no inputs")._repr_html_()

    def test_of_a_step_that_no_config_follows(self) -> None:
        report = SyncReport(2, error="layer 0 needs 64 < 80")
        assert tables(report) == []
        assert "layer 0 needs 64 &lt; 80" in report._repr_html_()
