"""What the OpenAPI document says, the API does: schemathesis asks a real server, with requests right and wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from components.config import RecallConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.recall.api.app import create_app
from components.recall.api.tokens import Scope, issue_token
from components.recall.state.scripts import AD_HOC_WORKERS
from components.recall.worker.adhoc import AdHocWorker
from tests.worlds.recall import Release, StartWorker, wait_until
from tests.worlds.servers import serve_application


@pytest.fixture
def document(
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    recall_config: RecallConfig,
    tmp_path: Path,
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The document of a served API, with a release, an ad-hoc worker, a stream nobody empties; and a token's header."""
    import schemathesis  # in functions: every process of the tests would take seconds for it at its start
    from schemathesis.config import SchemathesisConfig

    start_worker("ad-hoc", kind=AdHocWorker)
    roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    wait_until(lambda: client.zcard(AD_HOC_WORKERS))
    secret = issue_token(tmp_path / "tokens.json", "tester", list(Scope))
    settings = releases[0].settings.model_copy(update={"api_tokens_file": tmp_path / "tokens.json"})
    with serve_application(create_app(settings, recall_config)) as address:
        # The token is the test's; that requests without one are refused is a check of its own.
        # A wrong event in a list beside a right one is 207.
        refusal = {"negative_data_rejection": {"expected-statuses": [207, "4xx", "5xx"]}}
        config = SchemathesisConfig.from_dict({"generation": {"with-security-parameters": False}, "checks": refusal})
        document = schemathesis.openapi.from_url(f"{address}/openapi.json", config=config)
        yield document, {"Authorization": f"Bearer {secret}"}


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_answers_are_as_documented(document: tuple[Any, dict[str, str]], mode: str) -> None:
    from schemathesis import Case, GenerationMode
    from schemathesis.core.failures import FailureGroup
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    # No server error, a documented status, content type and body, wrong requests refused. That right ones are accepted
    # is not asked: a schema cannot say that an event must not lie in the future, or which tasks a release has.
    excluded = [positive_data_acceptance]
    schema, headers = document
    failures = {}
    for operation in (result.ok() for result in schema.get_all_operations()):

        @settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
        def check(case: Case) -> None:
            case.call_and_validate(headers=headers, excluded_checks=excluded)

        try:
            check()
        except Unsatisfiable:
            assert not operation.body and mode == "negative"  # nothing can be wrong with such a request
        except FailureGroup as error:
            failures[operation.label] = "\n".join(str(one) for one in error.exceptions)
    assert not failures, "\n\n".join(f"{label}\n{text}" for label, text in failures.items())
