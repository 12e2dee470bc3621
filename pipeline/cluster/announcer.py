"""Tells a run's driver which of Ray's actors and placement groups are the run's.

A module of its own, without torch: Ray's controller, in whose process this runs, imports it.
"""

import ray
from ray.actor import ActorHandle
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.util.placement_group import PlacementGroup

from pipeline.cluster.inbox import Started


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
