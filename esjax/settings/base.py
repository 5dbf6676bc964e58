"""What all sections of settings have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

# What marks a setting beside its type. Any other defines the result, and a run keeps its value.
EXECUTION = "execution"  # how a run is computed: no result changes beyond rounding, so it may change at any restart
CONTENT = "content"  # names files: what is in them counts, not where they lie or how that is spelt


class Settings(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, str_min_length=1
    )
