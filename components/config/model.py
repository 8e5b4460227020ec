"""Base of all configuration models."""

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """Base of all configuration models: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
