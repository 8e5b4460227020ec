"""What the table of the flow derives: which stages come before, and the arrows of a picture of it."""

import ast

import pytest

from components.config import load_config
from components.flow import FLOWS, STAGES, STUDIES, direct_inputs, stages_before
from tests.worlds import CONFIGS, REPOSITORY

# The arrows into each stage. A new stage adds none to these unless it is put between two of them.
ARROWS = {"ingest": (), "validate": ("ingest",), "features": ("validate",), "encode": ("validate",)}
ARROWS |= dict.fromkeys(("baseline", "sft"), ("features", "encode")) | {"evaluate": ("baseline", "sft")}
ARROWS |= {"gate": ("evaluate",), "release": ("gate",), "promote": ("release",)}


@pytest.mark.parametrize("name", ARROWS)
def test_arrows_leave_out_what_another_input_implies(name: str) -> None:
    assert direct_inputs(name, STAGES) == ARROWS[name]


def test_the_arrows_of_a_part_of_the_flow_stay_within_it() -> None:
    """Inputs outside the picture are no arrows, and imply nothing in it that they do not read."""
    assert direct_inputs("release", ["ingest", "validate", "sft"]) == ("sft",)
    assert direct_inputs("evaluate", ["features", "baseline"]) == ("baseline",)
    assert direct_inputs("sft", ["ingest"]) == ()


@pytest.mark.parametrize(
    ("names", "before"),
    [
        ([], ()),
        (["ingest"], ("ingest",)),
        (["sft"], ("ingest", "validate", "features", "encode", "sft")),
        (["encode", "features"], ("ingest", "validate", "features", "encode")),
    ],
)
def test_stages_before(names: list[str], before: tuple[str, ...]) -> None:
    assert stages_before(names) == before


def test_a_stage_reads_only_what_stands_before_it() -> None:
    names = list(STAGES)
    for position, (name, spec) in enumerate(STAGES.items()):
        assert set(spec.inputs) <= set(names[:position]), name
        assert set(spec.optional) <= set(spec.outputs), name
    for spec in STUDIES.values():
        assert set(spec.inputs) <= set(names), spec.name
    for flow, stages in FLOWS.items():
        assert list(stages) == [name for name in names if name in stages], flow


@pytest.mark.parametrize("spec", STAGES.values(), ids=lambda spec: spec.name)
def test_a_stage_is_a_module_with_a_function_run(spec) -> None:
    tree = ast.parse((REPOSITORY / f"{spec.entry.replace('.', '/')}.py").read_text())
    assert "run" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("spec", [*STAGES.values(), *STUDIES.values()], ids=lambda spec: spec.name)
def test_a_stage_notes_in_mlflow_where_the_flow_says(spec) -> None:
    tree = ast.parse((REPOSITORY / f"{spec.entry.replace('.', '/')}.py").read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    opens = {"run": {"track"}, "parent": {"parent_run_id"}, "none": set()}[spec.tracking]
    assert called & {"track", "parent_run_id"} == opens


@pytest.mark.parametrize("spec", [*STAGES.values(), *STUDIES.values()], ids=lambda spec: spec.name)
def test_the_sections_of_a_stage_exist(spec) -> None:
    assert load_config(CONFIGS / "complete_journey.yaml").fingerprint(spec.sections)  # or KeyError


def test_credentials_follow_from_what_a_stage_talks_to() -> None:
    tracked = {key: {"mlflow"} for key in ("baseline", "sft", "evaluate", "gate", "release")}
    assert {name: set(spec.credentials) for name, spec in STAGES.items() if spec.credentials} == {
        **tracked,
        "features": {"feast"},
        "promote": {"feast", "mlflow", "recall", "redis"},
    }
