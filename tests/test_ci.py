"""What CI says of an audit: a finding fails it, and a silent service is no clean bill."""

import json

import pytest

from tests.worlds import REPOSITORY, run_python

KNOWN = {"name": "torch", "version": "2.13.0", "vulns": []}
BAD = {"name": "redis", "version": "8.1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["8.1.1"]}]}
UNKNOWN = {"name": "feast", "skip_reason": "Dependency not found"}
OFFLINE = "import sys; sys.exit('requests.ConnectionError: no such host')"


@pytest.mark.parametrize(
    ("packages", "code", "sentences"),
    [
        ([KNOWN], 0, ["1 packages audited, 0 known vulnerabilities"]),
        ([KNOWN, BAD], 1, ["redis 8.1.0: PYSEC-1, fixed in 8.1.1", "2 packages audited, 1 known vulnerabilities"]),
        ([KNOWN, UNKNOWN], 0, ["NOT AUDITED, unknown to the vulnerability service: feast"]),
        ([UNKNOWN], 0, ["NOT AUDITED: the vulnerability service knows none of the 1 packages"]),
    ],
)
def test_an_audit_says_what_it_found_and_what_it_could_not_check(packages, code, sentences):
    done = run_python(".ci/audit.py", "echo", json.dumps({"dependencies": packages}))
    assert done.returncode == code
    assert set(sentences) <= set(done.stdout.splitlines())


@pytest.mark.parametrize(
    ("program", "code", "sentence"),
    [
        (
            OFFLINE,
            0,
            "NOT AUDITED, no vulnerability service answers: requests.ConnectionError: no such host",
        ),
        ("import sys; sys.exit('usage: wrong')", 1, "pip-audit failed: usage: wrong"),
    ],
)
def test_an_audit_without_a_report_fails_unless_nothing_answers(program, code, sentence):
    done = run_python(".ci/audit.py", "python", "-c", program)
    assert (done.returncode, done.stdout) == (code, f"{sentence}\n")


def test_ci_makes_the_bill_of_materials_and_the_audit():
    assert "make sbom audit" in (REPOSITORY / ".ci" / "run").read_text()
