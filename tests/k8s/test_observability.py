"""Dashboard and alert rules: every metric exists, every alert is tried and has a runbook."""

import json
import math
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from components.config import RecallConfig
from components.recall.process.health import InstanceCollector
from components.recall.process.supervisor import InstanceState, State
from components.recall.telemetry.metrics import AdHocMetrics, ApiMetrics, StreamMetrics
from tests.worlds import REPOSITORY

COMPONENT = REPOSITORY / "k8s" / "components" / "monitoring"
TRIALS = Path(__file__).parent / "alerts.test.yml"
DASHBOARD = json.loads((COMPONENT / "urm-recall.json").read_text())
RULE_FILE = yaml.safe_load((COMPONENT / "rules.yaml").read_text())[
    "spec"
]  # of the PrometheusRule: what Prometheus reads
ALL_RULES = [rule for group in RULE_FILE["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in ALL_RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in ALL_RULES if "record" in rule}
DASHBOARD_QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERIES = [rule["expr"] for rule in ALL_RULES] + DASHBOARD_QUERIES
OTHERS = {  # of kube-state-metrics, with the labels that it documents
    f"kube_pod{kind}_container_status_restarts_total": {"namespace", "pod", "container", "uid"}
    for kind in ("", "_init")
}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on PATH; Debian's package `prometheus` has it"
)


@cache
def exported() -> dict[str, set[str]]:
    """Names of all series that the processes export, with the names of their labels."""
    stream = StreamMetrics()
    stream.seen.at = math.inf
    registries = (stream.registry, AdHocMetrics().registry, ApiMetrics().registry)
    wrappers = [wrapper for registry in registries for wrapper in registry._collector_to_names]
    supervisor = InstanceCollector(lambda: State(0.0, (InstanceState(0, 1, "r", 0),)))
    families = [(one, set(getattr(wrapper, "_labelnames", ()))) for wrapper in wrappers for one in wrapper.collect()]
    families += [(family, set(family.samples[0].labels)) for family in supervisor.collect()]
    series = dict(OTHERS)
    for family, labels in families:
        for suffix in SUFFIXES[family.type]:
            series[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return series


@pytest.mark.parametrize("query", QUERIES)
def test_query_names_only_metrics_that_are_exported(query: str) -> None:
    words = set(re.findall(r"\b(?:urm[_:]|kube_)[a-zA-Z0-9_:]*", query))
    assert words, "a query that asks for nothing that is known"
    assert words - RECORDED - set(exported()) == set()


@pytest.mark.parametrize("query", QUERIES)
def test_query_selects_and_groups_by_labels_that_exist(query: str) -> None:
    series = exported()
    labels = set().union(*(series.get(name, set()) for name in re.findall(r"\b(?:urm|kube)_[a-z0-9_]+", query)))
    selected = re.findall(r"(\w+)(?:=~|!=|!~|=)\"", query)
    grouped = [name.strip() for names in re.findall(r"by \(([^)]*)\)", query) for name in names.split(",")]
    assert {*selected, *grouped} - labels == set()


@pytest.mark.parametrize("query", QUERIES)
def test_gauges_that_all_workers_see_alike_are_never_summed(query: str) -> None:
    assert not re.search(r"\b(sum|avg)\b[^(]*\((urm_(stream|dead|redis)_)", query)


def test_labels_that_queries_expect_have_their_values_from_the_start() -> None:
    worker, api = StreamMetrics().registry, ApiMetrics().registry
    for outcome in ("done", "failed", "dead"):
        assert worker.get_sample_value("urm_worker_events_total", {"outcome": outcome}) == 0
    for outcome in ("accepted", "duplicate", "refused"):
        assert api.get_sample_value("urm_api_events_total", {"outcome": outcome}) == 0


def test_the_longest_ad_hoc_request_is_still_told_apart() -> None:
    limits = RecallConfig.model_fields["ad_hoc_deadline_seconds"].metadata
    longest = next(limit.le for limit in limits if hasattr(limit, "le"))
    bounds = ApiMetrics().requests._upper_bounds
    assert 0.01 in bounds  # the target of a read
    assert bounds[-2] >= longest


def test_panels_are_placed_without_overlap_and_have_titles() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert panel["title"] and not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_leads_to_a_section_of_the_runbook(alert: dict[str, object]) -> None:
    annotations, labels = alert["annotations"], alert["labels"]
    assert isinstance(annotations, dict) and isinstance(labels, dict)
    page, anchor = annotations["runbook"].split("#")
    headings = re.findall(r"^#+ (.*)$", (REPOSITORY / page).read_text(), re.MULTILINE)
    assert anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert labels["severity"] in ("warning", "critical")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_is_tried_both_ways(alert: dict[str, object]) -> None:
    trials = [
        trial
        for test in yaml.safe_load(TRIALS.read_text())["tests"]
        for trial in test["alert_rule_test"]
        if trial["alertname"] == alert["alert"]
    ]
    assert {bool(trial.get("exp_alerts")) for trial in trials} == {True, False}


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """The rules as a file for promtool, with the trials beside it."""
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(RULE_FILE))
    shutil.copy(TRIALS, tmp_path)
    return path


@needs_promtool
def test_promtool_accepts_the_rules(rules: Path) -> None:
    run("check", "rules", "--lint-fatal", str(rules))


@needs_promtool
def test_alerts_fire_where_they_should_and_nowhere_else(rules: Path) -> None:
    run("test", "rules", str(rules.with_name(TRIALS.name)))


@needs_promtool
def test_promtool_can_parse_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:query{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(DASHBOARD_QUERIES)
    ]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    run("check", "rules", str(path))


def run(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
