"""A job in a process of its own, read line by line, whose processes the test can find and kill."""

import os
import re
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path


class Job:
    """The command in a process, and what Ray starts for it."""

    def __init__(self, name: str, *arguments: str) -> None:
        self._mark = secrets.token_hex(8)
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"jobs.{name}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PARALLAX_TEST_JOB": self._mark},
        )
        self.lines: list[str] = []

    def read_until(self, pattern: str, timeout_s: float = 200) -> None:
        """Returns at the first line with ``pattern``; the command is killed if none comes."""
        assert self._process.stdout is not None
        timer = threading.Timer(timeout_s, self._process.kill)
        timer.start()
        try:
            for line in self._process.stdout:
                self.lines.append(line)
                if re.search(pattern, line):
                    return
        finally:
            timer.cancel()
        raise AssertionError(f"ended without {pattern!r}:\n{''.join(self.lines)}")

    def finish(self, timeout_s: float = 400) -> str:
        """The rest of the output; the exit code has to be 0."""
        out, _ = self._process.communicate(timeout=timeout_s)
        self.lines.append(out)
        assert self._process.returncode == 0, "".join(self.lines)
        return "".join(self.lines)

    def wait(self) -> None:
        """Returns when the command has ended as it ends after a mistake."""
        self._process.communicate(timeout=60)
        assert self._process.returncode == 2, "".join(self.lines)

    def kill(self) -> None:
        """SIGKILL to the command; returns when Ray has ended what was its."""
        self._process.kill()
        self._process.wait()
        deadline = time.monotonic() + 120
        while self.pids(b"ray::"):
            assert time.monotonic() < deadline, "Ray's processes outlive their driver"
            time.sleep(0.5)

    def pids(self, *names: bytes) -> list[int]:
        """Its processes whose command line begins with one of ``names``, each process looked at once."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                is_ours = f"PARALLAX_TEST_JOB={self._mark}".encode() in (entry / "environ").read_bytes()
                if is_ours and (entry / "cmdline").read_bytes().startswith(names):
                    found.append(int(entry.name))
            except OSError:
                continue  # ended while we looked
        return found
