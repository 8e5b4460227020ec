import sys

import pytest

from components.exceptions import UserError
from components.flow import STAGES as ALL_STAGES
from components.studies.ablation import study
from components.studies.ablation.grid import Grid
from components.studies.ablation.study import STAGES, VariantError, run_variant

GROUPS = {"a": {"title": "A", "variants": {"h_1": {"urm.num_user_vectors": 1}}}}
GRID = Grid.model_validate({"description": "Tiny.", "seeds": [0], "groups": GROUPS})


@pytest.fixture
def urm(tmp_path, monkeypatch):
    """A program in the place of `urm` that writes down its arguments, and fails where a file says so."""
    log, fail = tmp_path / "log", tmp_path / "fail"
    script = (
        "import sys, pathlib\n"
        f"with open({str(log)!r}, 'a') as stream: print(*sys.argv[1:], file=stream)\n"
        f"fail = pathlib.Path({str(fail)!r})\n"
        "sys.exit(int(fail.read_text()) if fail.exists() and sys.argv[1] == 'sft' else 0)\n"
    )
    monkeypatch.setattr(study, "URM", (sys.executable, "-c", script))
    return log, fail


def test_stages_run_in_order_with_the_settings_of_the_variant(urm):
    log, _ = urm
    run_dir = run_variant(GRID, "h_1", 0, config="c", study_dir="/runs/study", overrides=["source.max_users=6"])
    assert run_dir == "/runs/study.h_1.seed0"
    options = f"--config c --run-dir {run_dir} --set source.max_users=6 --set urm.num_user_vectors=1 --set seed=0"
    assert log.read_text().splitlines() == [f"{name} {options}" for name in (*STAGES, "ablation measure")]


def test_the_stages_are_those_that_sft_needs():
    needed, names = {"sft"}, list(ALL_STAGES)
    for name in reversed(names):
        if name in needed:
            needed |= set(ALL_STAGES[name].inputs)
    assert list(STAGES) == [name for name in names if name in needed]


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (2, UserError, r"expected `urm sft` to accept its settings \(urm.num_user_vectors=1"),
        (1, VariantError, "1; run"),
    ],
)
def test_a_failing_stage_ends_the_variant(urm, code, error, message):
    log, fail = urm
    fail.write_text(str(code))
    with pytest.raises(error, match=message) as caught:
        run_variant(GRID, "h_1", 0, config="c", study_dir="/runs/study")
    assert caught.value.exit_code == code
    assert "measure" not in log.read_text()
