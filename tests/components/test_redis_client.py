import pytest
import redis

from components.exceptions import UnavailableError
from components.redis_client import is_unavailable, open_redis, redis_errors
from tests.worlds.servers import RedisServer, free_port, own_server

__all__ = ["own_server"]  # fixtures


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("Connection refused"),
        redis.TimeoutError("Timeout reading from socket"),
        redis.exceptions.BusyLoadingError("Redis is loading the dataset in memory"),
        redis.exceptions.ReadOnlyError("You can't write against a read only replica."),
        redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        redis.ResponseError("MISCONF Redis is configured to save RDB snapshots, but cannot persist on disk."),
        redis.ResponseError("NOREPLICAS Not enough good replicas to write."),
        redis.ResponseError("BUSY Redis is busy running a script."),
        redis.ResponseError("UNBLOCKED force unblock from blocking operation, instance state changed"),
        redis.ResponseError("Error running script (call to f_0): @user_script: 1: -READONLY You can't write"),
        redis.ResponseError("Error running script (call to f_0): @user_script: 3: OOM command not allowed when used"),
    ],
)  # fmt: skip
def test_a_redis_that_cannot_serve_now_is_waited_for(error: redis.RedisError) -> None:
    assert is_unavailable(error)


@pytest.mark.parametrize(
    "error",
    [
        redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
        redis.ResponseError("NOGROUP No such key 'urm:events' or consumer group 'recall'"),
        redis.ResponseError("ERR wrong number of arguments for 'set' command"),
        ValueError("READONLY"),
    ],
)
def test_other_errors_are_not_waited_for(error: Exception) -> None:
    assert not is_unavailable(error)


def test_a_replica_is_one_sentence_without_the_command(own_server: RedisServer) -> None:
    with open_redis(own_server.url) as client:
        client.replicaof("127.0.0.1", free_port())
        answer = "expected an answer, got an error of a server that cannot serve"
        with pytest.raises(UnavailableError, match=answer) as on, redis_errors(own_server.url):
            client.eval("return redis.call('SET', KEYS[1], ARGV[1])", 1, "key", "arsenic")
    assert "arsenic" not in str(on.value)


def test_a_connection_that_the_server_has_closed_is_made_anew(own_server: RedisServer) -> None:
    with open_redis(own_server.url) as client, redis.Redis.from_url(own_server.url) as other:
        client.set("key", "before")
        other.client_kill_filter(_type="normal", skipme=True)
        assert client.get("key") == "before"
