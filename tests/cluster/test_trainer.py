"""What a person reads when a worker group has failed for good; Ray's own exceptions, no cluster."""

from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from pipeline.cluster.trainer import explain
from pipeline.data.assemble import BadSamplesError


def test_a_list_that_ends_the_run_is_told_whole_and_once_for_all_ranks() -> None:
    bad = BadSamplesError("2 of 60 images:\n  3 in a.tar: cut\n  9 in b.tar: empty")
    message = explain(WorkerGroupError("", {1: bad, 0: bad}), 3)
    assert message.endswith(f"\nrank 0, 1: BadSamplesError: {bad}")
    assert "at most 3 restarts (cluster.max_failures)" in message


def test_of_ray_s_own_errors_the_last_line_is_told() -> None:
    lost = RayActorError(error_msg="The actor died.\n\tclass_name: X\nIts node was lost.")
    message = explain(WorkerGroupError("", {0: BadSamplesError("x"), 1: lost}), 0)
    assert message.endswith("\nrank 0: BadSamplesError: x\nrank 1: RayActorError: Its node was lost.")
