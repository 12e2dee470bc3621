"""A job that refuses what it was given, run in the test's own process."""

import sys
from collections.abc import Callable

import pytest


def refused(monkeypatch: pytest.MonkeyPatch, main: Callable[[], object], *command: str) -> None:
    """``main`` with this ``sys.argv`` ends with exit code 2, and leaves no Ray connected."""
    monkeypatch.setattr(sys, "argv", list(command))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
