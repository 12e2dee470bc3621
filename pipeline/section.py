"""What all parts of a config have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from pipeline.secrets import objections


class Section(BaseModel):
    """Refuses secrets, keys that it does not know and numbers that are infinite or none, and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _holds_no_secret(cls, values: Any) -> Any:
        """Before all other checks: their messages quote values."""
        if found := list(objections(values)):
            raise ValueError("; ".join(found))
        return values
