"""Reports on their way from the workers to the driver; training never waits for them.

A module of its own, without torch: the actor's process imports it, and torch would cost that process 7 CPU s
and 900 MB.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.progress import Progress

_POLL_S = 0.5


@dataclass(frozen=True)
class WorkerFailure:
    """Why a rank stopped; the group then starts again from the newest checkpoint."""

    rank: int
    reason: str


@dataclass(frozen=True)
class WorkerWaiting:
    """What holds a rank up, each 10 s anew."""

    rank: int
    line: str


@dataclass(frozen=True)
class Started:
    """What of Ray's belongs to a run."""

    controller: ActorHandle  # its ``abort`` ends the run
    placement_group: PlacementGroup | None = None  # outlives a controller that is killed, and holds the CPUs


Report = Progress | WorkerFailure | WorkerWaiting


@dataclass(frozen=True)
class Addressed:
    """What a run of a sweep tells the sweep's driver."""

    trial: str
    run_id: str
    content: Report | Started


@ray.remote(num_cpus=0)
class _Reports:
    def __init__(self) -> None:
        self._waiting: list[Any] = []

    def put(self, report: Any) -> None:
        self._waiting.append(report)

    def drain(self) -> list[Any]:
        waiting, self._waiting = self._waiting, []
        return waiting


class Inbox:
    """The driver's end. ``actor`` goes to the workers, which call ``actor.put.remote(report)``."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor: Any = _Reports.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]

    @contextmanager
    def forwarding(self, on_report: Callable[[Any], None]) -> Iterator[None]:
        """Calls ``on_report``, in a thread, for each report until the block ends and the inbox is empty.

        What ``on_report`` raises is raised again when the block ends; training is not disturbed by it.
        """
        done = threading.Event()
        failures: list[Exception] = []

        def forward() -> None:
            try:
                while not done.wait(_POLL_S):
                    self._forward_waiting(on_report)
            except Exception as error:  # noqa: BLE001 - raised again below, in the driver's thread
                failures.append(error)

        thread = threading.Thread(target=forward, name="reports", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if not failures:
                self._forward_waiting(on_report)
        if failures:
            raise failures[0]

    def _forward_waiting(self, on_report: Callable[[Any], None]) -> None:
        for report in ray.get(self.actor.drain.remote()):
            on_report(report)
