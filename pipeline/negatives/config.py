"""Where the keys of a momentum queue are kept besides every rank's own replica."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class NegativesConfig(BaseModel):
    """``local``: the ranks gather each step's keys. ``service``: sharded actors number, keep and hand them out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["local", "service"] = "local"
    num_shards: int = Field(default=1, ge=1, le=256)  # actors, spread over the nodes
    max_staleness: int = Field(default=0, ge=0, le=64)  # steps a replica may lag; 0 = the local backend's trajectory

    @model_validator(mode="after")
    def _local_is_exact(self) -> Self:
        if self.backend == "local" and (self.max_staleness or self.num_shards != 1):
            raise ValueError(
                "negatives.max_staleness and negatives.num_shards are the service's; use negatives.backend=service, or "
                "leave both out: the local queue is never stale and has no shards"
            )
        return self
