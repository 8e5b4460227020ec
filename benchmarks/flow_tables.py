"""Tables of README.md and docs/architecture.md that come from the table of the flow, `components/flow.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from components.flow import STAGES, STUDIES, StageSpec


def stages() -> str:
    """What each stage does."""
    return _table(("stage", "what it does"), ((f"`{spec.name}`", spec.summary) for spec in STAGES.values()))


def outputs() -> str:
    """What each output of each stage is."""
    return _table(("stage", "output", "what it is"), _outputs(STAGES.values(), lambda spec: spec.name))


def studies() -> str:
    """What each study measures, and what its outputs are."""
    rows = _outputs(STUDIES.values(), lambda spec: f"`{spec.name}`: {spec.summary}")
    return _table(("study", "output", "what it is"), rows)


def _outputs(specs: Iterable[StageSpec], describe: Callable[[StageSpec], str]) -> Iterator[tuple[str, ...]]:
    """A row per output; the description of a stage is in its first."""
    for spec in specs:
        description = describe(spec)
        for name, text in spec.outputs.items():
            yield description, f"`{name}`{' (optional)' if name in spec.optional else ''}", text
            description = ""


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {"stages": stages, "outputs": outputs, "studies": studies}
