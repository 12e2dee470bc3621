"""The actors around the shards of a queue or a bank, and the driver's and the ranks' ends of them.

The driver owns the actors: they outlive worker groups, come back after their own death, and end with the driver, even
one that is killed; Ray sees to that, so nothing needs a heartbeat. Their namespace is the run's, so that two runs
never meet, and a second driver of the same run is refused.

No torch here, as in inbox.py: an actor's process takes 1 s to start instead of 7.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from pipeline.errors import UserError
from pipeline.negatives.config import NegativesConfig
from pipeline.negatives.protocol import Reply, ShardsLostError
from pipeline.negatives.shard import NotOpenError, Shard, Spec

_PREFIX = "parallax-queue-"
_ANSWER_S = 15.0  # a shard that is slower counts as lost and is asked again
_NAME_WAIT_S = 20.0  # a driver that was killed leaves its actors to Ray, which ends them within seconds


class QueueInUseError(UserError):
    """Another driver serves the negatives of the same run."""


# no CPU, which a small cluster needs for its ranks; the memory of an empty process, because actors that ask for nothing
# are not spread but put anywhere
@ray.remote(num_cpus=0, memory=100 << 20, scheduling_strategy="SPREAD", max_restarts=-1, max_task_retries=0)
class _Shard:
    """A shard whose callers can wait for a complete step. None = it is not open."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._shard: Shard | None = None  # of the kind that it is first filled with
        self._life = secrets.randbits(62)
        self._changed = asyncio.Condition()
        self._callers: dict[float, Mapping[str, float]] = {}  # by rank, what it last told of itself

    async def open(self, generation: int, spec: Spec) -> int | None:
        try:
            self._opened().open(generation, spec)
        except NotOpenError:
            return None
        return self._life

    async def fill(self, generation: int, spec: Spec, content: Any) -> bool | None:
        if self._shard is None:
            self._shard = spec.shard(self._index)
        try:
            self._shard.fill(generation, spec, content)
        except NotOpenError:
            return None
        self._callers.clear()
        await self._notify()  # those who wait under an older generation
        return True

    async def exchange(
        self,
        generation: int,
        life: int,
        pushes: list[Any],
        request: Any,
        caller: Mapping[str, float],
        at_least: int,
        wait_s: float,
    ) -> Reply | None:
        try:
            shard = self._opened()
            shard.require(generation)
            self._callers[caller["rank"]] = caller
            for rows in pushes:
                shard.push(generation, rows)
            if pushes:
                await self._notify()
            if request is None:
                return Reply(self._life, shard.duplicates, None)
            if life == self._life:
                await self._wait(generation, at_least, wait_s)
            return Reply(self._life, shard.duplicates, shard.read(generation, request))
        except NotOpenError:
            return None

    async def status(self) -> dict[str, Any]:
        report: dict[str, Any] = {"open": False}
        if self._shard is not None and self._shard.is_open:
            shard = self._shard
            report = {"open": True, "duplicates": shard.duplicates, "received_bytes": shard.received_bytes}
            report |= shard.status()
        node = ray.get_runtime_context().get_node_id()
        return report | {"pid": os.getpid(), "node": node, "callers": [*self._callers.values()]}

    def _opened(self) -> Shard:
        if self._shard is None:
            raise NotOpenError
        return self._shard

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, generation: int, at_least: int, wait_s: float) -> None:
        shard = self._opened()

        def arrived() -> bool:
            shard.require(generation)
            return shard.complete >= at_least

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(arrived), wait_s)
            except TimeoutError:
                return  # the caller sees how far the steps go


@contextmanager
def serving(negatives: NegativesConfig, run_id: str) -> Iterator[list[ActorHandle]]:
    """The run's shards, for as long as the block lasts; none with the local backend.

    QueueInUseError if another driver has them.
    """
    if negatives.backend == "local":
        yield []
        return
    actors: list[ActorHandle] = []
    try:
        for index in range(negatives.num_shards):
            actors.append(_start(run_id, index))  # noqa: PERF401 - those that started end if a later one cannot
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def _start(run_id: str, index: int) -> ActorHandle:
    deadline = time.monotonic() + _NAME_WAIT_S
    while True:
        try:
            return _Shard.options(  # type: ignore[attr-defined]
                name=f"shard-{index}", namespace=_PREFIX + run_id
            ).remote(index)
        except ValueError as error:  # the name is taken
            if time.monotonic() > deadline:
                raise QueueInUseError(
                    f"another driver is training {run_id} and serves its negatives; wait for it, end it, or change the "
                    "config or its name to train another encoder"
                ) from error
            time.sleep(0.5)


def status() -> dict[str, list[dict[str, Any]]]:
    """By run, what each shard of its negatives holds, over all runs of the connected cluster.

    A shard that is being restarted has no ``pid``.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    named = ray.util.list_named_actors(all_namespaces=True)
    for entry in sorted(named, key=lambda entry: (entry["namespace"], entry["name"])):
        if entry["namespace"].startswith(_PREFIX):
            try:
                actor = ray.get_actor(entry["name"], namespace=entry["namespace"])
            except ValueError:
                continue  # it has ended since it was listed
            try:
                report = ray.get(actor.status.remote(), timeout=_ANSWER_S)
            except (RayActorError, GetTimeoutError):
                report = {"open": False}
            found.setdefault(entry["namespace"].removeprefix(_PREFIX), []).append({"name": entry["name"]} | report)
    return found


class RayShards:
    """``Shards`` over the actors' handles."""

    def __init__(self, actors: Sequence[ActorHandle]) -> None:
        self._actors = actors

    def __len__(self) -> int:
        return len(self._actors)

    def open(self, generation: int, spec: Spec) -> list[int | None]:
        """See ``Shards.open``."""
        return _answers([actor.open.remote(generation, spec) for actor in self._actors], _ANSWER_S)

    def fill(self, generation: int, spec: Spec, contents: Sequence[Any]) -> None:
        """See ``Shards.fill``."""
        calls = zip(self._actors, contents, strict=True)
        _complete(_answers([actor.fill.remote(generation, spec, x) for actor, x in calls if x is not None], _ANSWER_S))

    def exchange(
        self,
        generation: int,
        lives: Sequence[int],
        pushes: Sequence[Sequence[Any]],
        requests: Sequence[Any],
        *,
        caller: Mapping[str, float],
        at_least: int,
        wait_s: float,
    ) -> list[Reply]:
        """See ``Shards.exchange``."""
        calls = zip(self._actors, lives, pushes, requests, strict=True)
        return _complete(
            _answers(
                [
                    actor.exchange.remote(generation, life, rows, request, caller, at_least, wait_s)
                    for actor, life, rows, request in calls
                ],
                wait_s + _ANSWER_S,
            )
        )


def _answers(calls: list[Any], timeout_s: float) -> list[Any]:
    try:
        return ray.get(calls, timeout=timeout_s)
    except (RayActorError, GetTimeoutError) as error:
        raise ShardsLostError(str(error)) from error
    except RayTaskError as error:
        raise error.cause from None


def _complete(answers: list[Any]) -> list[Any]:
    if None in answers:
        raise ShardsLostError("a shard is not open")
    return answers
