"""Releases and Redis as in the tests of the recall runtime."""

from tests.components.recall.conftest import (  # noqa: F401  # pytest finds fixtures by name
    client,
    promoted,
    recall_config,
    redis_server,
    releases,
    start_worker,
)
