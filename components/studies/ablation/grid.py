"""The grid of an ablation study (configs/ablations/*.yaml). Imports little, since a DAG reads it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from components.config import Model, RunConfig, load_document
from components.exceptions import ConfigError

REFERENCE = "main"
Overrides = dict[str, Any]  # value by dotted key


class Group(Model):
    """Variants that answer one question; the reference belongs to every group."""

    title: str
    variants: dict[str, Overrides] = Field(min_length=1, description="Name -> what differs from the reference.")

    @property
    def axis(self) -> str | None:
        """The key whose numbers the group varies, all others being the same; None if it varies anything else."""
        keys = {key for overrides in self.variants.values() for key in overrides}
        values = {key: [overrides.get(key) for overrides in self.variants.values()] for key in keys}
        varied = [key for key, of_key in values.items() if any(value != of_key[0] for value in of_key)]
        numeric = all(isinstance(value, int | float) for key in varied for value in values[key])
        numeric = numeric and not any(isinstance(value, bool) for key in varied for value in values[key])
        return varied[0] if len(varied) == 1 and numeric else None

    def places(self, reference: dict[str, Any]) -> dict[str, float]:
        """Where each variant stands on the axis, and the reference (its configuration, nested) if nothing else differs.

        Empty without an axis.
        """
        if (axis := self.axis) is None:
            return {}
        places = {name: float(overrides[axis]) for name, overrides in self.variants.items()}
        if all(overrides.keys() == {axis} for overrides in self.variants.values()):
            found: Any = reference
            for part in axis.split("."):
                found = found[part]
            places[REFERENCE] = float(found)
        return places


class Grid(Model):
    """A study."""

    description: str
    seeds: tuple[int, ...] = Field(min_length=1)
    overrides: Overrides = Field(default_factory=dict, description="Overrides of all variants, the reference included.")
    groups: dict[str, Group] = Field(min_length=1)
    contrasts: dict[str, tuple[str, str]] = Field(
        default_factory=dict, description="Title -> a variant and the one subtracted from it, compared per task."
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [name for group in self.groups.values() for name in group.variants]
        repeated = [name for name in names if names.count(name) > 1 or name == REFERENCE]
        if repeated:
            raise ValueError(f"expected every variant once and none called {REFERENCE!r}, not {repeated[0]!r}")
        unknown = [name for pair in self.contrasts.values() for name in pair if name not in self.variants]
        if unknown:
            raise ValueError(f"expected contrasts of variants of the grid, not of {unknown[0]!r}")
        return self

    @property
    def variants(self) -> dict[str, Overrides]:
        """Every variant with what differs from the reference, which comes first."""
        named = {name: overrides for group in self.groups.values() for name, overrides in group.variants.items()}
        return {REFERENCE: {}} | named

    def only(self, names: Collection[str]) -> Grid:
        """The grid with these variants only; groups without any, and contrasts without both, are dropped."""
        groups = {
            key: group.model_copy(update={"variants": left})
            for key, group in self.groups.items()
            if (left := {name: overrides for name, overrides in group.variants.items() if name in names})
        }
        contrasts = {title: pair for title, pair in self.contrasts.items() if set(pair) <= {REFERENCE, *names}}
        return self.model_copy(update={"groups": groups, "contrasts": contrasts})

    def of_seed(self, seed: int | None) -> Grid:
        """The grid with this seed only; with all of its own if there is none."""
        return self if seed is None else self.model_copy(update={"seeds": (seed,)})

    def settings_of(self, variant: str, seed: int) -> list[str]:
        """A variant as KEY=VALUE overrides of the configuration, for `urm <stage> --set`.

        Raises:
            ConfigError: The grid has no such variant.
        """
        if variant not in self.variants:
            raise ConfigError(
                "option --variant",
                expected="one of " + ", ".join(self.variants),
                got=repr(variant),
                remedy="name a variant of the grid",
            )
        return write_settings(self.overrides | self.variants[variant] | {"seed": seed})


def load_grid(name: str, configs_dir: Path) -> Grid:
    """Read a grid by its name in configs/ablations, or by its path.

    Raises:
        ConfigError: The file is missing, or has a mistake.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = configs_dir / "ablations" / f"{name}.yaml"
    return load_document(path, Grid)


def variant_dir(study_dir: str, variant: str, seed: int) -> str:
    """Run directory of a variant, next to that of the study, so that they share the results of equal stages."""
    return f"{study_dir.rstrip('/')}.{variant}.seed{seed}"


def digest_settings(config: RunConfig) -> str:
    """Digest of that in which the trainings of a variant with several seeds agree."""
    return config.model_copy(update={"seed": 0}).fingerprint(("features", "items", "tasks", "urm", "evaluation.k"))


def write_settings(overrides: Overrides) -> list[str]:
    """As KEY=VALUE for `urm <stage> --set`, whose values are YAML, of which JSON is a part; a time becomes its text."""
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in overrides.items()]
