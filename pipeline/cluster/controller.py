"""What is ours in the process of Ray Train's controller: when to give up, and what the driver is told of.

A module of its own, without torch: the controller starts 3 s sooner.
"""

import ray
from ray.actor import ActorHandle
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.placement_group import PlacementGroup

from pipeline.cluster.inbox import Started
from pipeline.errors import DeterministicError


class GiveUpPolicy(DefaultFailurePolicy):
    """Does not start a group again whose failure every restart would meet."""

    def _is_retryable_error(self, training_failed_error: TrainingFailedError) -> bool:
        return hopeless(training_failed_error) is None and super()._is_retryable_error(training_failed_error)


def hopeless(error: TrainingFailedError) -> DeterministicError | None:
    """The DeterministicError that a rank died of, if one did; others may have died of its end."""
    failures = getattr(error, "worker_failures", {}).values()
    return next((failure for failure in failures if isinstance(failure, DeterministicError)), None)


class Announcer(ControllerCallback, WorkerGroupCallback):
    """Puts ``Started`` into the inbox when the controller starts, and again with each worker group."""

    def __init__(self, inbox: ActorHandle) -> None:
        self._inbox = inbox

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """The controller can be told to abort from now on."""
        self._announce(None)

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Its placement group holds the CPUs."""
        self._announce(worker_group.get_worker_group_state().placement_group_handle.placement_group)

    def _announce(self, placement_group: PlacementGroup | None) -> None:
        self._inbox.put.remote(Started(ray.get_runtime_context().current_actor, placement_group))
