"""What a person reads when a worker group has failed for good; Ray's own exceptions, no cluster."""

from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from pipeline.cluster.trainer import explain
from pipeline.data.assemble import BadSamplesError


def failure(error: Exception) -> UserExceptionWithTraceback:
    """As Ray hands it over: the traceback as text."""
    lines = ["Traceback (most recent call last):", '  File "x.py", line 1, in fit']
    return UserExceptionWithTraceback(
        error, "\n".join([*lines, f"{type(error).__module__}.BadSamplesError: {error}\n"])
    )


def test_a_list_that_ends_the_run_is_told_whole_and_once_for_all_ranks() -> None:
    bad = BadSamplesError("2 of 60 images:\n  3 in a.tar: cut\n  9 in b.tar: empty")
    error = WorkerGroupError("", {0: failure(bad), 1: failure(bad)})
    message = explain(error, 3, dict.fromkeys(range(2), f"BadSamplesError: {bad}"))
    assert message.endswith(f"\nrank 0, 1: BadSamplesError: {bad}")
    assert "at most 3 restarts (cluster.max_failures)" in message
    assert "Traceback" not in message


def test_words_of_an_earlier_attempt_do_not_count() -> None:
    killed = RuntimeError("The actor died: its node was lost.\nIt was killed.")
    message = explain(WorkerGroupError("", {1: killed}), 0, {0: "ValueError: early", 1: "ValueError: earlier"})
    assert message.endswith("\nrank 1: It was killed.")
    assert "earl" not in message
