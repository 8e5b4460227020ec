import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from components.exceptions import ConfigError
from components.settings import Settings, child_environment, get_settings, hide_credentials, setting_variables
from tests.worlds import REPOSITORY


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("URM_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def test_everything_lies_under_the_home_by_default(tmp_path: Path) -> None:
    settings = get_settings()
    home = tmp_path / "home"
    assert settings.runs_root == str(home / "runs")
    assert settings.cache_path == home / "cache"
    assert settings.tracking_uri == f"sqlite:///{home}/mlflow/mlflow.db"


def test_a_run_is_a_path_or_a_name_under_the_root(tmp_path: Path) -> None:
    settings = get_settings()
    assert settings.find_run_dir("nightly") == str(tmp_path / "home" / "runs" / "nightly")
    assert settings.find_run_dir("manual__2026-11-26T06:29") == settings.run_dir("manual__2026-11-26T06:29")
    assert settings.find_run_dir("s3://shop/runs/a:b") == "s3://shop/runs/a:b"


def test_a_relative_home_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(home=Path("state"))
    assert settings.runs_root == str(tmp_path / "state" / "runs")
    assert settings.cache_path == tmp_path / "state" / "cache"


def test_a_variable_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("URM_DEVICE", "gpu")
    with pytest.raises(ConfigError, match="setting URM_DEVICE: expected 'auto', 'cpu' or 'cuda', got 'gpu'; change or"):
        get_settings()
    monkeypatch.setenv("URM_DEVICE", "cpu")
    monkeypatch.setenv("URM_NUM_THREADS", "-1")
    with pytest.raises(ConfigError, match="setting URM_NUM_THREADS: expected greater than or equal to 0, got '-1'"):
        get_settings()


def test_a_variable_that_others_define_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ConfigError, match="setting RANK: expected"):
        get_settings()


def test_the_page_for_operators_has_every_variable() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    table = page.split("## Settings")[1].split("\n## ")[0]
    rows = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    variables = {field.validation_alias or f"URM_{name.upper()}" for name, field in Settings.model_fields.items()}
    assert variables == set(re.findall(r"`([A-Z_]{4,})`", rows))


def test_the_environment_goes_before_what_the_services_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "services.env").write_text("URM_REDIS_URL=redis://left:1/0\nURM_API_URL=http://left:2\n")
    monkeypatch.setenv("URM_API_URL", "http://set:3")
    settings = get_settings()
    assert settings.redis_url == "redis://left:1/0"
    assert settings.api_url == "http://set:3"


def test_a_run_id_of_airflow_makes_a_safe_folder() -> None:
    settings = Settings(runs_uri="s3://bucket/runs/")
    expected = "s3://bucket/runs/manual__2026-11-25T13-00-00-00-00-x"
    assert settings.run_dir("manual__2026-11-25T13:00:00+00:00/x") == expected


def test_run_names_of_other_scripts_stay_apart() -> None:
    settings = Settings(runs_uri="s3://bucket/runs/")
    assert settings.run_dir("größe 2") == "s3://bucket/runs/größe-2"
    assert len({settings.run_dir(name) for name in ("日本", "中文", "größe", "gr-e")}) == 4


def test_a_password_is_not_printed() -> None:
    settings = Settings(airflow_password=SecretStr("hunter2"))
    assert "hunter2" not in f"{settings!r} {settings}"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("redis://:p@ss@redis:6379/0", "redis://redis:6379/0"),
        ("https://user:word@mlflow/a@b", "https://mlflow/a@b"),
        ("http://[user:word@", "http://"),
        ("sqlite:////home/a@b.db", "sqlite:////home/a@b.db"),
    ],
)
def test_credentials_are_cut_from_an_address(uri: str, shown: str) -> None:
    assert hide_credentials(uri) == shown


def test_every_secret_is_marked_as_the_credentials_of_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new field of type SecretStr without a mark would reach every process."""
    secrets = {name for name, field in Settings.model_fields.items() if field.annotation is SecretStr}
    assert secrets
    for name in secrets:
        monkeypatch.setenv(f"URM_{name.upper()}", "hunter2")
    assert "hunter2" not in setting_variables().values()
    assert "hunter2" not in child_environment(["mlflow", "redis", "feast"]).values()


def test_a_child_inherits_what_is_listed_and_the_credentials_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "MLFLOW_TRACKING_TOKEN": "a", "URM_REDIS_URL": "b", "AIRFLOW_CONN_X": "c", "URM_RUNS_URI": "d", "RANK": "1",
        "AWS_PROFILE": "e", "UNKNOWN": "f", "URM_UNKNOWN": "g", "FEAST_REGISTRY_URI": "h",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    def inherited(*credentials: str) -> set[str]:
        return given.keys() & child_environment(credentials)

    always = {"URM_RUNS_URI", "RANK", "AWS_PROFILE"}
    assert inherited() == always
    assert inherited("mlflow", "redis") == always | {"MLFLOW_TRACKING_TOKEN", "URM_REDIS_URL"}
    assert inherited("airflow", "feast") == always | {"AIRFLOW_CONN_X", "FEAST_REGISTRY_URI"}
    assert given.keys() & setting_variables() == {"URM_RUNS_URI", "RANK"}


@pytest.mark.parametrize(
    ("uri", "allowed"),
    [
        ("s3://urm/runs/a/bundle", True),
        ("s3://urm/runs", True),
        ("/srv/urm/a", True),
        ("s3://urm/runs-of-others/a", False),
        ("s3://urm/runs/../others", False),
        ("/srv/urm/../others", False),
        ("http://urm/runs", False),
    ],
)
def test_releases_are_read_from_allowed_places_only(uri: str, allowed: bool) -> None:
    settings = Settings(allowed_uris="s3://urm/runs/, /srv/urm")
    Settings().require_allowed(uri)
    if allowed:
        settings.require_allowed(uri)
    else:
        with pytest.raises(ConfigError, match="expected one below s3://urm/runs or /srv/urm, got another"):
            settings.require_allowed(uri)


def test_an_allowed_place_behind_a_link_is_where_the_link_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    for prefix in (f"{tmp_path}/data", f"{tmp_path}/disk", "data/"):
        settings = Settings(allowed_uris=prefix)
        settings.require_allowed(f"{tmp_path}/data/a")
        settings.require_allowed("disk/a")
        with pytest.raises(ConfigError, match="got another"):
            settings.require_allowed(f"{tmp_path}/database/a")
