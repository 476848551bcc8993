"""lm-evaluation-harness on a task of its own: the perplexity of a local text."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

_TASK = """\
task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


def bits(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte, by `lm_eval --model hf`."""
    with TemporaryDirectory() as name:
        file = Path(name, "text.jsonl")
        file.write_text(json.dumps({"text": asked["text"]}) + "\n", encoding="utf-8")
        Path(name, "local_text.yaml").write_text(_TASK.format(file=file), encoding="utf-8")
        results = simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder},dtype=float32,trust_remote_code=True,max_length=256",
            tasks=["local_text"],
            task_manager=TaskManager(include_path=name, include_defaults=False),
            device="cpu",
            batch_size=1,
            bootstrap_iters=0,
        )
    return {"bits_per_byte": results["results"]["local_text"]["bits_per_byte,none"]}
