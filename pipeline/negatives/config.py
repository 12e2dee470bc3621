"""Where a momentum queue and a memory bank are kept."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.section import Section


class NegativesConfig(Section):
    """``local``: every rank has a replica, and the ranks gather what is new in each step.

    ``service``: sharded actors number and hand out a queue's keys, of which every rank still keeps a replica, and hold
    the slots of a bank, of which no rank does.
    """

    backend: Literal["local", "service"] = "local"
    num_shards: int = Field(default=1, ge=1, le=256)  # actors, spread over the nodes
    max_staleness: int = Field(default=0, ge=0, le=64)  # steps a queue may lag; 0 = the local backend's trajectory

    @model_validator(mode="after")
    def _local_is_exact(self) -> Self:
        if self.backend == "local" and (self.max_staleness or self.num_shards != 1):
            raise ValueError(
                "negatives.max_staleness and negatives.num_shards are the service's; use negatives.backend=service, or "
                "leave both out: the local replicas are never stale and have no shards"
            )
        return self
