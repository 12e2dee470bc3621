"""What all parts of a config have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Refuses keys that it does not know and numbers that are infinite or none, and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
