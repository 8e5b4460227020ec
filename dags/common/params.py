"""Parameters that every DAG takes: which configuration, and what differs from it."""

from __future__ import annotations

from airflow.sdk import Param

CONFIG = Param(
    "complete_journey",
    type="string",
    pattern=r"^[a-z][a-z0-9_]*$",
    examples=["complete_journey", "amazon_beauty", "marketplace", "production"],
    title="Configuration",
    description="Name of a file in configs/, without .yaml.",
)
OVERRIDES = Param(
    [],
    type=["array", "null"],  # the form sends null for an empty field
    items={"type": "string", "pattern": r"^[A-Za-z_][A-Za-z0-9_.]*=.*$"},
    title="Overrides",
    description="Values that differ from the configuration, one KEY=VALUE per line, e.g. urm.max_steps=50.",
)
FORCE = Param(
    False,
    type="boolean",
    title="Force",
    description="Compute every stage again, even where an equal result exists.",
)
