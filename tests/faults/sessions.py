"""Commands in sessions of their own, and their ends."""

import contextlib
import os
import signal
import subprocess
from typing import Any


def end_session(process: "subprocess.Popen[Any]") -> None:
    """Kill a command with everything it started, as a power cut does: Ray's own watch over its driver takes ten seconds."""
    process.kill()
    process.wait()
    while left := alive_of(process.pid):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def alive_of(session: int) -> list[int]:
    """The processes of a session, less those that nobody has waited for yet."""
    told = subprocess.run(["ps", "-s", str(session), "-o", "pid=,stat="], capture_output=True, text=True, check=False)
    return [int(pid) for pid, state in map(str.split, told.stdout.splitlines()) if not state.startswith("Z")]
