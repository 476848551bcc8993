"""Pictures of reports: the data that is drawn, and the files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import small
import torch_pruning as tp

from tp_hf_config import HFConfigSyncHook, SyncReport
from tp_hf_config.plots import field_changes, plot_history, plot_widths

pytestmark = pytest.mark.usefixtures("every_width")


@pytest.fixture(scope="module")
def hook() -> HFConfigSyncHook:
    """Of a Llama after two steps: hidden size 32 to 24, FFN 64 to 48."""
    model = small.llama()
    hook = HFConfigSyncHook(prune=small.inside(model))
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        iterative_steps=2,
        hooks=[hook],
    )
    pruner.step()
    pruner.step()
    return hook


def parameters(hidden: int, ffn: int) -> int:
    """Of that Llama: embeddings and head, attention, FFN and norms of two layers, last norm."""
    return 2 * 40 * hidden + 2 * (4 * 32 * hidden + 3 * ffn * hidden + 2 * hidden) + hidden


def bars(ax: Any) -> dict[str, dict[str, float]]:
    """Label of the row -> series -> length of its bar."""
    labels = [text.get_text() for text in ax.get_yticklabels()]
    return {
        label: {series.get_label(): series[row].get_width() for series in ax.containers}
        for row, label in enumerate(labels)
    }


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


class TestWidths:
    def test_of_one_report(self, hook: HFConfigSyncHook, tmp_path: Path):
        figure = hook.reports[0].plot(tmp_path / "widths.png")
        (fields,) = figure.axes
        assert bars(fields) == {
            "hidden_size": {"before": 32, "after": 28},
            "intermediate_size": {"before": 64, "after": 56},
        }
        assert [text.get_text() for text in fields.texts] == ["32 \u2192 28", "64 \u2192 56"]
        assert fields.get_title("left") == "config fields"
        assert is_png(tmp_path / "widths.png")

    def test_of_a_run(self, hook: HFConfigSyncHook, tmp_path: Path):
        (fields,) = hook.plot(str(tmp_path / "run.png")).axes
        assert bars(fields) == {
            "hidden_size": {"before": 32, "after": 24},
            "intermediate_size": {"before": 64, "after": 48},
        }
        assert is_png(tmp_path / "run.png")

    def test_the_suffix_says_the_format(self, hook: HFConfigSyncHook, tmp_path: Path):
        hook.plot(tmp_path / "run.svg")
        assert "<svg" in (tmp_path / "run.svg").read_text()

    def test_lists_are_drawn_entry_by_entry_and_unset_values_not(self):
        fields = {"sizes": ([8, 16], [8, 12]), "head_dim": (None, 4), "kind": ("a", "b")}
        reports = [SyncReport(1, fields=fields), SyncReport(2, fields={"sizes": ([8, 12], [4, 6])})]
        assert field_changes(reports) == {"sizes[0]": (8, 4), "sizes[1]": (16, 6)}

    def test_a_report_of_no_change_says_so(self, tmp_path: Path):
        (fields,) = SyncReport(1).plot(tmp_path / "none.png").axes
        assert fields.get_title("left") == "config fields: nothing changed"


class TestHistory:
    def test_parameters_and_metrics(self, hook: HFConfigSyncHook, tmp_path: Path):
        metrics = {"perplexity": [9.0, 11.5, 14.0], "loss after recovery": [2.5, 2.0]}
        figure = hook.plot_history(tmp_path / "history.png", metrics)
        drawn = {ax.get_ylabel(): ax.lines[0].get_xydata().tolist() for ax in figure.axes}
        assert drawn == {
            "parameters": [
                [0, parameters(32, 64)],
                [1, parameters(28, 56)],
                [2, parameters(24, 48)],
            ],
            "perplexity": [[0, 9.0], [1, 11.5], [2, 14.0]],
            "loss after recovery": [[1, 2.5], [2, 2.0]],
        }
        assert is_png(tmp_path / "history.png")

    def test_parameters_are_in_the_report(self, hook: HFConfigSyncHook):
        assert [report.to_dict()["parameters"] for report in hook.reports] == [
            {"before": parameters(32, 64), "after": parameters(28, 56)},
            {"before": parameters(28, 56), "after": parameters(24, 48)},
        ]

    def test_a_metric_of_another_length_is_refused(self, hook: HFConfigSyncHook, tmp_path: Path):
        with pytest.raises(
            ValueError, match=r"^perplexity has 1 values for 2 pruning steps: expected 2"
        ):
            hook.plot_history(tmp_path / "no.png", {"perplexity": [3.0]})
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("plot", [plot_widths, plot_history])
def test_nothing_to_draw(plot: Any, tmp_path: Path):
    with pytest.raises(
        ValueError,
        match=r"^there is nothing to plot: the hook has no report yet. Call pruner.step\(\)",
    ):
        plot([], tmp_path / "no.png")


@pytest.mark.parametrize("plot", [plot_widths, plot_history])
def test_without_matplotlib_it_says_what_to_type(
    plot: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError) as raised:
        plot([SyncReport(1)], tmp_path / "no.png")
    assert str(raised.value) == "plots need matplotlib: pip install 'tp-hf-config[plot]'"
