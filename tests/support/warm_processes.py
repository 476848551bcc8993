"""Fresh processes that start at once: forks of one that has imported PyTorch and Transformers.

Starting Python and importing both takes six seconds of a core, and hundreds of tests do it.  A fork
has what these imports leave and nothing else: no model, no test, nothing of the library.  What is
about starting a process itself uses ``subprocess``.

Usage: :func:`start`.  The process that forks is started when it is first used, and ends with the
one that started it.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Fork:
    """A running script; the part of ``subprocess.Popen`` that is used of it.

    Attributes:
        pid: its process.
        returncode: its exit status, negative for a signal; None until it was waited for.
    """

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def wait(self) -> int:
        """Its exit status, when it has ended."""
        if self.returncode is None:
            self.returncode = _ask({"wait": self.pid})
        return self.returncode

    def kill(self) -> None:
        """End it, if it runs."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)  # a child that nobody has waited for: it exists


def start(
    script: str | Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    errors: str | Path,
) -> Fork:
    """Run a script as ``python SCRIPT ARGUMENTS`` does.

    Args:
        script: the file.
        arguments: what it finds in ``sys.argv``.
        environment: the whole of its environment; what is read as PyTorch or Transformers are
            imported is as in this process.
        errors: the file for its standard error; its standard output is thrown away.
    """
    request = {
        "script": str(script),
        "arguments": list(arguments),
        "environment": dict(environment),
        "folder": os.getcwd(),
        "errors": str(errors),
    }
    return Fork(_ask(request))


def _ask(request: dict[str, Any]) -> int:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    atexit.register(server.stdin.close)
    return server


def _serve() -> None:
    """Answer every line of standard input with the number that it asks for, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends, then this one does
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no reply
    _import()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                replies.close()
                _become(request)
        print(answer, file=replies, flush=True)


def _import() -> None:
    """Import what nearly every script needs, and look through it at no collection."""
    import gc

    import safetensors.torch  # noqa: F401
    import torch
    from transformers import (  # noqa: F401
        AutoModel,
        BertModel,
        GPT2LMHeadModel,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        T5ForConditionalGeneration,
        ViTModel,
    )

    assert torch.get_default_dtype() == torch.float32
    gc.collect()
    gc.freeze()


def _become(request: dict[str, Any]) -> None:
    """Run a script in this process as if it had been started for it; does not return."""
    import runpy
    import traceback

    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDWR)
    errors = os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for own, new in enumerate((nothing, nothing, errors)):
        os.dup2(new, own)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    script = request["script"]
    sys.argv = [script, *request["arguments"]]
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[0:1] = [str(Path(script).parent), *paths]
    code: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
