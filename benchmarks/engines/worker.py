"""One tool and model in a process: ``worker.py MODULE.py TASK FOLDER QUESTION ANSWER``.

Runs in the tool's environment, which has neither this library nor its Torch-Pruning.  What the tool
raises is its answer: a refusal is a result, and its last words are the message.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """Call the task, write down what came."""
    module, task, folder, question, answer = sys.argv[1:]
    asked = json.loads(Path(question).read_text(encoding="utf-8"))
    sys.path.insert(0, str(Path(module).parent))
    found: dict[str, Any]
    try:
        found = getattr(importlib.import_module(Path(module).stem), task)(Path(folder), asked)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
