"""What the shards of a queue and those of a memory bank have in common: whom they answer, and since when.

Plain NumPy over bytes, without torch: the process around a shard starts in a second and takes 100 MB.
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol

from pipeline.errors import UserError

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class ServiceError(UserError):
    """The service and those who use it do not agree on what it keeps, or it does not answer."""


class NotOpenError(Exception):
    """The shard holds nothing yet, or lost it with its process: it is to be filled, and newer steps sent again."""


class Spec(Protocol):
    """What all ranks and all shards must agree on."""

    @property
    def num_shards(self) -> int: ...

    def shard(self, index: int) -> "Shard":
        """An empty shard for it."""
        ...


class Shard(ABC):
    """One of ``spec.num_shards``.

    A worker group fills and opens the shard under a generation, higher than that of every group before it; calls of an
    older group are refused, so a rank that was given up for dead cannot write into its successors' negatives.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.generation = 0  # the highest that has called
        self.is_open = False
        self.complete = 0  # all steps (of a bank) or keys (of a queue) below this number have arrived
        self.duplicates = 0  # pushes that came again
        self.received_bytes = 0
        self.spec: Any

    @abstractmethod
    def fill(self, generation: int, spec: Any, content: Any) -> None:
        """Take what rank 0 has for a shard that is not open, which with the last of it then is.

        Nothing happens if it is open. ServiceError if a newer worker group has the shard, or the content does not fit.
        """

    @abstractmethod
    def push(self, generation: int, rows: Any) -> None:
        """Take one rank's rows of one step; those that are here already are counted and left out."""

    @abstractmethod
    def read(self, generation: int, request: Any) -> Any:
        """The answer, a copy."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """What the shard holds, for people."""

    def open(self, generation: int, spec: Any) -> None:
        """Agree on ``spec``. NotOpenError if rank 0 has to fill the shard first; ServiceError as ``fill``."""
        self.require(generation)
        if spec != self.spec:
            raise ServiceError(f"the service was opened for {self.spec}, and this rank has {spec}")

    def require(self, generation: int) -> None:
        """NotOpenError before the shard is open; ServiceError if a newer worker group has it."""
        self.refuse_older(generation)
        if generation > self.generation or not self.is_open:
            raise NotOpenError

    def refuse_older(self, generation: int) -> None:
        """ServiceError if a newer worker group has the shard."""
        if generation < self.generation:
            raise ServiceError(
                "another worker group has taken over these negatives; this one no longer counts and must end"
            )
