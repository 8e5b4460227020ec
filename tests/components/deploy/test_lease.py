import threading
from collections.abc import Callable

import pytest
from kubernetes.client import ApiClient, Configuration

from components.deploy.cluster import Cluster, ConflictError
from components.deploy.lease import NAME, Lease
from components.exceptions import ConfigError, MissingInputError, ReleaseError, UnavailableError
from tests.worlds import wait_until
from tests.worlds.cluster import NAMESPACE, ApiServer
from tests.worlds.recall import free_address

Connect = Callable[[], Cluster]


def test_one_at_a_time_and_the_object_keeps_its_labels(api_server: tuple[ApiServer, Connect]) -> None:
    state, connect = api_server
    first, second = Lease(connect(), 0.9), Lease(connect(), 0.9)
    with first.hold(1):
        first.require()
        with pytest.raises(UnavailableError, match=rf"end within 0\.2 s, got one that goes on, {first.holder}"):
            with second.hold(0.2):
                pass
        with pytest.raises(ReleaseError, match=f"Lease {NAME}: expected the only promotion, got another one"):
            second.require()
    with second.hold(1):  # at once, since the first has given it back
        second.require()
    lease = state.read(NAME, "leases")
    assert lease["metadata"]["labels"] == {"app": "urm"}
    assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]) == ("", 4)


def test_a_short_wait_is_long_enough_to_find_out_who_was_killed(api_server: tuple[ApiServer, Connect]) -> None:
    _, connect = api_server
    Lease(connect(), 0.9)._acquire(1)  # and nothing renews it
    with Lease(connect(), 0.9).hold(0.1):
        pass


def test_it_is_renewed_while_it_is_held_and_taken_over_once_it_is_silent(
    api_server: tuple[ApiServer, Connect],
) -> None:
    _, connect = api_server
    living, waiting = Lease(connect(), 0.9), Lease(connect(), 0.9)
    with living.hold(1):
        with pytest.raises(UnavailableError):
            with waiting.hold(2.5):
                pass
    killed = Lease(connect(), 0.9)
    killed._acquire(1)  # and nothing renews it
    with waiting.hold(5):
        with pytest.raises(ReleaseError, match="took over when this one stood still"):
            killed.require()


def test_of_many_that_find_it_free_one_gets_it(api_server: tuple[ApiServer, Connect]) -> None:
    _, connect = api_server
    held, most, lock, done = 0, 0, threading.Lock(), []

    def promote() -> None:
        nonlocal held, most
        with Lease(connect()).hold(30):
            with lock:
                held += 1
                most = max(most, held)
            with lock:
                held -= 1
        done.append(1)

    threads = [threading.Thread(target=promote) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, len(done)) == (1, 4)


def test_a_renewal_that_fails_now_and_then_does_no_harm(api_server: tuple[ApiServer, Connect]) -> None:
    state, connect = api_server
    lease = Lease(connect(), 0.6)
    with lease.hold(1):
        renewed = state.read(NAME, "leases")["spec"]["renewTime"]
        state.refused["PUT"] = [503]
        wait_until(lambda: state.read(NAME, "leases")["spec"]["renewTime"] > renewed)
        assert state.refused["PUT"] == []
        lease.require()


def test_what_the_api_refuses_is_one_sentence(api_server: tuple[ApiServer, Connect]) -> None:
    state, connect = api_server
    cluster = connect()
    with pytest.raises(MissingInputError, match="deployment nobody: expected it in namespace urm, got nothing; apply"):
        cluster.read_deployment("nobody")
    for status, error in ((403, ReleaseError), (500, UnavailableError), (429, UnavailableError)):
        state.refused["GET"] = [status]
        with pytest.raises(error, match="the server is busy"):
            cluster.read_deployment("recall-worker")
    old = cluster.read_lease(NAME)
    cluster.replace_lease(NAME, old)
    with pytest.raises(ConflictError):
        cluster.replace_lease(NAME, old)


def test_a_cluster_that_is_not_there_is_one_sentence(
    api_server: tuple[ApiServer, Connect], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = api_server[1]()._api.configuration.host
    for host in (f"http://{free_address()}", address.replace("http:", "https:")):
        with pytest.raises(UnavailableError, match=r"^Kubernetes API: expected an answer, got .*; try again when it"):
            Cluster(ApiClient(Configuration(host=host)), NAMESPACE).read_lease(NAME)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", "/nowhere")
    with pytest.raises(ConfigError, match="Kubernetes: expected the token of a service account, or a file that KUBEC"):
        Cluster.open(NAMESPACE)
