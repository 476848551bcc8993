"""``tp-hf-config``: run one command, print its report and return the exit code.

Exit codes: 0 done or sound; 1 refused or not sound; 2 wrong usage, or could not tell; 130 Ctrl-C;
141 the output cannot be written, or nobody reads it; 129 hung up; 143 terminated.
"""

from __future__ import annotations

import io
import signal
import sys
from importlib.util import find_spec

from .output import INTERRUPTED, PROGRAM, UNKNOWN, UNREAD, discard, say


def run() -> int:
    """Run one command as a process's main function; return the exit code."""
    for name in ("SIGTERM", "SIGHUP"):  # an exception, so that half-written files are removed
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # no nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return main()
    except KeyboardInterrupt:  # before the command starts, or while its report is printed
        say(f"{PROGRAM}: interrupted")
        return INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    """Run one command; ``argv`` has no program name. Return the exit code."""
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # >&-
    if find_spec("typer") is None:
        say(f"{PROGRAM} needs typer: pip install 'tp-hf-config[cli]'")
        return UNKNOWN
    from .commands import outcome_of

    try:
        text, code = outcome_of(sys.argv[1:] if argv is None else argv)
        print(text, end="\n" if text else "", flush=True)
    except OSError as error:
        discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            say(f"{PROGRAM}: the output cannot be written: {error}")
        return UNREAD
    return code
