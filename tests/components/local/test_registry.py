import stat
from pathlib import Path

import pytest

from components.exceptions import DataError, UnavailableError
from components.local.processes import ProcessRecord
from components.local.registry import Registry, ServiceRecord
from components.settings import get_settings

RECORD = ServiceRecord(
    process=ProcessRecord(pid=1, started="boot 250"),
    port=6379,
    url="redis://x",
    log=Path("/l/redis.log"),
    fingerprint="f",
)


def test_round_trip(tmp_path):
    registry = Registry(tmp_path)
    assert registry.read() == {}
    registry.write({"redis": RECORD})
    assert registry.read() == {"redis": RECORD}
    registry.clear()
    assert registry.read() == {}


def test_a_file_of_something_else_is_one_sentence(tmp_path):
    (tmp_path / "services.json").write_text('{"redis": {"pid": 1}}')
    with pytest.raises(DataError, match=r"service registry .*services.json: expected a file written by this version"):
        Registry(tmp_path).read()


def test_two_commands_at_once_are_refused(tmp_path):
    with Registry(tmp_path).locked():
        with pytest.raises(UnavailableError, match="expected one command at a time"):
            with Registry(tmp_path).locked():
                pass
    with Registry(tmp_path).locked():
        pass


def test_other_commands_find_the_services(tmp_path, monkeypatch):
    registry = Registry(tmp_path)
    registry.write_environment({"URM_REDIS_URL": "redis://127.0.0.1:7777/0", "URM_API_URL": "http://127.0.0.1:8001"})
    monkeypatch.setenv("URM_HOME", str(tmp_path))
    monkeypatch.setenv("URM_API_URL", "http://elsewhere")
    monkeypatch.delenv("URM_REDIS_URL", raising=False)
    get_settings.cache_clear()
    settings = get_settings()
    get_settings.cache_clear()
    assert settings.redis_url == "redis://127.0.0.1:7777/0"
    assert settings.api_url == "http://elsewhere"  # the environment goes before the file
    assert stat.S_IMODE(registry.env_path.stat().st_mode) == 0o600
