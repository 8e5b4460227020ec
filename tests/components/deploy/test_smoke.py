"""The smoke check against the real API, real workers and a real Redis."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from components.client import RecallClient
from components.config import ItemFilter, RecallConfig
from components.deploy.smoke import SmokeCheck
from components.exceptions import ConfigError, ReleaseError
from components.recall.api.tokens import Scope, issue_token
from components.recall.serving.engine import ServingRelease, load_release
from components.recall.state.scripts import AD_HOC_WORKERS
from components.recall.worker.adhoc import AdHocWorker
from components.recall.worker.stream import RecallWorker
from components.release.publication import Publication
from components.settings import Settings
from tests.components.test_client import served
from tests.worlds.recall import Release, StartWorker, make_event, wait_until

Promoted = tuple[RecallWorker, Publication]


@pytest.fixture
def settings(
    releases: tuple[Release, Release],
    recall_config: RecallConfig,
    start_worker: StartWorker,
    promoted: Promoted,
    client: redis.Redis,
    tmp_path: Path,
) -> Iterator[Settings]:
    """Of a promotion, beside an API with tokens, a worker, and an ad-hoc worker that serves the first release."""
    start_worker("ask", kind=AdHocWorker)
    wait_until(lambda: client.zcard(AD_HOC_WORKERS))
    tokens = tmp_path / "tokens.json"
    token = issue_token(tokens, "promotion", [Scope.READ, Scope.WRITE, Scope.ASK])
    with served(releases[0], recall_config, tokens) as url:
        yield releases[0].settings.model_copy(update={"api_url": url, "api_token": SecretStr(token)})


def check(settings: Settings, release: Release, client: redis.Redis, recall: RecallConfig) -> SmokeCheck:
    return SmokeCheck(settings, release.config.release, recall, client, patience_seconds=2)


def test_what_serves_passes_and_the_made_up_user_leaves_nothing(
    settings: Settings,
    promoted: Promoted,
    releases: tuple[Release, Release],
    client: redis.Redis,
    recall_config: RecallConfig,
) -> None:
    smoke = check(settings, releases[0], client, recall_config)
    figures = smoke(promoted[1], True)
    assert figures["overlap"] == 1.0 and figures["users"] == 9  # three users, three tasks
    assert figures["ask_seconds"] > 0 and figures["visible_seconds"] > 0
    assert list(client.scan_iter("*urm-smoke*")) == []
    assert smoke(promoted[1], False).keys() == {"visible_seconds"}


def test_an_event_with_words_is_followed_where_every_task_is_a_search(
    settings: Settings,
    promoted: Promoted,
    releases: tuple[Release, Release],
    client: redis.Redis,
    recall_config: RecallConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*arguments: Any) -> ServingRelease:
        release = load_release(*arguments)
        return replace(release, tasks=tuple(task for task in release.tasks if task.needs_query))

    monkeypatch.setattr("components.deploy.smoke.load_release", load)
    assert check(settings, releases[0], client, recall_config)(promoted[1], False).keys() == {"visible_seconds"}


def test_a_known_user_with_live_events_is_asked_with_them(
    settings: Settings,
    promoted: Promoted,
    releases: tuple[Release, Release],
    client: redis.Redis,
    recall_config: RecallConfig,
) -> None:
    with RecallClient(settings.api_url, settings.api_token.get_secret_value()) as api:
        events = [make_event(str(user), 1040 + user) for user in range(12)]
        api.send(events)
        wait_until(lambda: api.recall("11").event_id == events[11].event_id)
    assert check(settings, releases[0], client, recall_config)(promoted[1], True)["overlap"] == 1.0


def test_another_release_another_policy_and_a_missing_right_are_refused_with_the_reason(
    settings: Settings,
    promoted: Promoted,
    releases: tuple[Release, Release],
    client: redis.Redis,
    recall_config: RecallConfig,
) -> None:
    second = Publication(release=releases[1].name, bundle=str(releases[1].bundle), order=promoted[1].order + 1)
    for ad_hoc in (True, False):
        with pytest.raises(ReleaseError, match=rf"{second.release} within 2 s, .* of release {promoted[1].release}"):
            check(settings, releases[1], client, recall_config)(second, ad_hoc)
    other = recall_config.model_copy(update={"filters": {"all": ItemFilter(deny_categories=("shelf 1", "shelf 2"))}})
    with pytest.raises(ReleaseError, match=r"at least 0\.95 of its own top 10 .*; see that .* one configuration"):
        check(settings, releases[0], client, other)(promoted[1], True)
    nobody = settings.model_copy(update={"api_token": SecretStr("wrong")})
    with pytest.raises(ReleaseError, match=r"an ad-hoc answer of release .*unknown token"):
        check(nobody, releases[0], client, recall_config)(promoted[1], True)
    with pytest.raises(ConfigError, match="URM_API_URL: expected the address of the recall API, got none"):
        check(settings.model_copy(update={"api_url": ""}), releases[0], client, recall_config)
