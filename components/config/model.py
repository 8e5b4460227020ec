"""Base of all configuration models."""

from pydantic import BaseModel, ConfigDict

NAME = r"^[a-z][a-z0-9_]*$"  # of a configuration or a task; the forms of the DAGs ask for the same


class Model(BaseModel):
    """Base of all configuration models: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
