"""What a person reads when a worker group has failed for good; Ray's own exceptions, no cluster."""

from ray.exceptions import RayActorError
from ray.train import FailureConfig, WorkerGroupError

from pipeline.cluster.controller import GiveUpPolicy, hopeless
from pipeline.cluster.trainer import explain
from pipeline.collapse import CollapseError
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


def test_a_group_starts_again_unless_every_start_would_end_alike() -> None:
    collapsed = WorkerGroupError("", {0: RayActorError(error_msg="its peer was gone"), 1: CollapseError("as before")})
    lost = WorkerGroupError("", {0: RayActorError(error_msg="its node was lost")})
    policy = GiveUpPolicy(FailureConfig(max_failures=1))
    assert [policy.make_decision(error).value for error in (lost, lost, collapsed)] == ["RETRY", "RAISE", "RAISE"]
    assert GiveUpPolicy(FailureConfig(max_failures=-1)).make_decision(collapsed).value == "RAISE"
    assert str(hopeless(collapsed)) == "as before"
    assert hopeless(lost) is None
