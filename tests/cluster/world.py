"""The recall service in a namespace of its own of a real cluster: the one that KUBECONFIG names.

Manifests and images are those that users apply; only sizes, and the addresses of Redis and the object store, are the
tests' own. Commands of `urm` run here, as the service account `urm-promotion`. The three images of
`k8s/images/Dockerfile`, and those of Valkey and of moto, the object store, must be there for the nodes to run.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import mlflow
import pytest
import redis
import yaml

from components.client import RecallClient
from components.config import RunConfig
from components.deploy.pods import is_complete
from components.recall.api.tokens import Scope, issue_token
from components.redis_client import open_redis
from components.release.bundle import describe_files, hash_manifest, name_release, read_manifest, write_manifest
from components.release.registry import open_registry, register, version_of_alias
from components.settings import Settings
from components.stages.release import run as release_stage
from components.storage import run_stage
from tests.worlds import REPOSITORY, wait_until
from tests.worlds.tiny import make_config, make_run

__all__ = ["first_release", "kubectl", "namespace", "service"]  # fixtures

Object = dict[str, Any]
STORE = "s3://urm"
PASSWORD = secrets.token_hex(16)
COMPONENTS = ("redis", "airflow")
WORKER, AD_HOC, API = "recall-worker", "recall-adhoc", "recall-api"
DEADLINE_SECONDS = 60  # of a rollout
HERE = Path(__file__).parent


class Kubectl:
    """kubectl, in one namespace."""

    def __init__(self, namespace: str = "") -> None:
        self.namespace = namespace

    def __call__(self, *arguments: str, given: str | None = None, fails: bool = False) -> str:
        """Its output; where it fails, which `fails` allows, also that."""
        place = ["--namespace", self.namespace] if self.namespace else []
        command = ["kubectl", *place, *arguments]
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=300)
        assert fails or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr if fails else done.stdout

    def read(self, *arguments: str) -> Object:
        """An object, or a list of objects."""
        found: Object = json.loads(self("get", *arguments, "--output", "json"))
        return found

    def pods(self, component: str) -> list[Object]:
        """Its pods that are not ending."""
        found = self.read("pods", "--selector", f"app.kubernetes.io/component={component}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def address(self, component: str) -> str:
        """Address of a ready pod."""
        return next(pod["status"]["podIP"] for pod in self.pods(component) if is_ready(pod))


def is_ready(pod: Object) -> bool:
    """Whether it takes traffic."""
    return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))


@dataclass
class ClusterRelease:
    """A registered release whose bundle and features are in the object store."""

    name: str
    version: str
    run_dir: str
    bundle: str


@dataclass
class Service:
    """What the tests use of the service.

    Attributes:
        kubectl: In its namespace, as administrator.
        home: State of the `urm` commands: the MLflow registry.
        environment: Of these commands.
        settings: The same, read.
        releases: Two of equal data and different models, the first of which serves when a test begins.
    """

    kubectl: Kubectl
    home: Path
    environment: dict[str, str]
    settings: Settings
    releases: list[ClusterRelease] = field(default_factory=list)

    @property
    def redis(self) -> redis.Redis:
        """A client of its Redis."""
        return open_redis(self.settings.redis_url)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a `urm` command, as the service account that promotes."""
        command = [sys.executable, "-m", "components", *arguments]
        environment = {**self.environment, "URM_API_URL": f"http://{self.kubectl.address(API)}:8000"}
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def urm(self, *arguments: str) -> tuple[int, str]:
        """Exit code and last lines of a `urm` command."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=400)
        return process.returncode, (out + err)[-3000:]

    def promote(self, release: ClusterRelease) -> tuple[int, str]:
        """Promote a release with the command."""
        return self.urm("promote", "--config", "tiny", "--run-dir", release.run_dir, "--force")

    def alias(self, name: str) -> str | None:
        """The release under an alias of the registry."""
        found = version_of_alias(open_registry(self.settings), "urm", name)
        return None if found is None else str(found.tags["urm.release"])

    def annotation(self, deployment: str = WORKER, name: str = "urm.release/name") -> str | None:
        """An annotation of a Deployment's template."""
        template = self.kubectl.read("deployment", deployment)["spec"]["template"]["metadata"]
        found: str | None = (template.get("annotations") or {}).get(name)
        return found

    def serving(self) -> str:
        """What the API says."""
        with RecallClient(f"http://{self.kubectl.address(API)}:8000", self.environment["URM_API_TOKEN"]) as api:
            return str(api.tasks().release)

    def settled(self) -> bool:
        """Whether no rollout is under way."""
        return all(is_complete(self.kubectl.read("deployment", name)) for name in (WORKER, AD_HOC))

    def require_agreement(self, release: ClusterRelease) -> None:
        """Check that templates, pods, API and registry name one release."""
        wait_until(lambda: self.settled() and self.serving() == release.name, 120)
        assert {self.annotation(WORKER), self.annotation(AD_HOC)} == {release.name}
        for component in (WORKER, AD_HOC):
            for pod in self.kubectl.pods(component):
                assert pod["metadata"]["annotations"]["urm.release/name"] == release.name
        assert self.alias("champion") == release.name


@pytest.fixture(scope="session")
def kubectl() -> Kubectl:
    """kubectl with a cluster that answers."""
    stands_in = "tests/k8s and tests/components/deploy stand in"
    if "KUBECONFIG" not in os.environ:
        pytest.skip(f"KUBECONFIG names no cluster; {stands_in}")
    if shutil.which("kubectl") is None:
        pytest.skip(f"kubectl is not on PATH; {stands_in}")
    answer = Kubectl()("version", "--request-timeout", "10s", fails=True)
    if "Server Version" not in answer:
        pytest.skip(f"the cluster of KUBECONFIG does not answer; {stands_in}")
    return Kubectl()


@contextmanager
def apply_base(
    folder: Path,
    config: RunConfig,
    settings: dict[str, str],
    components: Sequence[str] = COMPONENTS,
    patches: Sequence[Object] = (),
) -> Iterator[Kubectl]:
    """A namespace with the base and components, and an object store; `config` is what serves.

    `settings` go before those of the base, and `patches` to the kustomization, which lies in the folder.
    """
    name = f"urm-test-{secrets.token_hex(3)}"
    own = Kubectl(name)
    settings = {"URM_NAMESPACE": name, "URM_RUNS_URI": f"{STORE}/runs", "URM_ALLOWED_URIS": STORE} | settings
    kustomization = {
        "namespace": name,
        "resources": [os.path.relpath(REPOSITORY / "k8s" / "base", folder)],
        "components": [os.path.relpath(REPOSITORY / "k8s" / "components" / one, folder) for one in components],
        "patches": yaml.safe_load((HERE / "patches.yaml").read_text().replace("NAME-OF-CONFIG", config.name))
        + list(patches),
        "configMapGenerator": [
            {"name": "urm-settings", "behavior": "merge", "literals": [f"{key}={settings[key]}" for key in settings]},
            {"name": "test-configs", "files": [f"{config.name}.yaml"]},
        ],
        "generatorOptions": {"disableNameSuffixHash": True},
    }  # fmt: skip
    write_config(folder, config)
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    try:
        own("apply", "--server-side", "--kustomize", str(folder))
        own("apply", "--server-side", "--filename", str(HERE / "s3.yaml"))
        acl = f"user urm on >{PASSWORD} ~* &* +@all\nuser default on nopass -@all +ping\n"
        own("create", "secret", "generic", "redis-users", f"--from-literal=users.acl={acl}")
        for component in ("redis", "s3"):
            pause_until(lambda component=component: any(map(is_ready, own.pods(component))), 90)
        if not _reaches(own.address("redis"), 6379):
            pytest.skip("pod addresses are not reached from here; run these tests on a node, or in a pod")
        yield own
    finally:
        Kubectl()("delete", "namespace", name, "--wait=false", "--ignore-not-found", fails=True)


@pytest.fixture(scope="session")
def namespace(kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """The manifests with the tiny world's configuration, applied; nothing is promoted yet."""
    with apply_base(tmp_path_factory.mktemp("kustomize"), make_config(), {}) as found:
        yield found


@pytest.fixture(scope="session")
def service(namespace: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service with its first release promoted."""
    home = tmp_path_factory.mktemp("home")
    redis_host, store = namespace.address("redis"), f"http://{namespace.address('s3')}:5000"
    shared = {"URM_REDIS_URL": f"redis://urm:{PASSWORD}@{redis_host}:6379/0"} | store_variables(store)
    tokens = home / "tokens.json"
    token = issue_token(tokens, "tests", [Scope.READ, Scope.WRITE, Scope.ASK])
    write_config(home, make_config())
    literals = [f"--from-literal={key}={text}" for key, text in shared.items()]
    namespace("create", "secret", "generic", "urm-credentials", *literals)
    namespace("create", "secret", "generic", "recall-tokens", f"--from-file=tokens.json={tokens}")
    namespace("create", "secret", "generic", "urm-promotion", *literals, f"--from-literal=URM_API_TOKEN={token}")
    own = {
        "URM_HOME": str(home), "URM_CONFIGS_DIR": str(home), "URM_FEATURE_REPO_DIR": str(REPOSITORY / "feature_repo"),
        "URM_RUNS_URI": f"{STORE}/runs", "URM_DEPLOY_TO": "kubernetes", "URM_NAMESPACE": namespace.namespace,
        "URM_API_TOKEN": token, "URM_DEVICE": "cpu", "URM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
        "KUBECONFIG": str(write_kubeconfig(namespace, "urm-promotion", home / "kubeconfig")),
    }  # fmt: skip
    kept = {key: text for key, text in os.environ.items() if not key.startswith("URM_")}
    with pytest.MonkeyPatch.context() as patch:
        for key, text in shared.items():
            patch.setenv(key, text)
        make_bucket()
        settings = Settings(
            home=home, configs_dir=home, feature_repo_dir=REPOSITORY / "feature_repo", runs_uri=f"{STORE}/runs",
            redis_url=shared["URM_REDIS_URL"], deploy_to="kubernetes", namespace=namespace.namespace, device="cpu",
            num_threads=1, api_token=token,
        )  # fmt: skip
        found = Service(namespace, home, {**kept, **shared, **own}, settings)
        found.releases = [build_release(settings, home, seed) for seed in (1, 0)][::-1]
        # Credentials came after the pods, which wait for them.
        wait_until(lambda: len([pod for pod in namespace.pods(API) if is_ready(pod)]) == 2, 120)
        # The first release is the older one, and the newer one is the candidate by now.
        open_registry(settings).set_registered_model_alias("urm", "candidate", found.releases[0].version)
        code, said = found.promote(found.releases[0])
        assert code == 0, said
        yield found


@pytest.fixture(autouse=True)
def first_release(request: pytest.FixtureRequest) -> Iterator[None]:
    """Begin every test that uses the service with the first release, and with every rollout ended."""
    if "service" in request.fixturenames:
        go_back(request.getfixturevalue("service"))
    yield


def go_back(service: Service) -> None:
    """Let the first release serve, and the second be the candidate."""
    first, second = service.releases
    if service.annotation() != first.name or service.alias("champion") != first.name or not service.settled():
        code, said = service.urm("rollback", "--config", "tiny", "--to", first.name, "--why", "next test")
        assert code == 0, said
    open_registry(service.settings).set_registered_model_alias("urm", "candidate", second.version)


def store_variables(address: str) -> dict[str, str]:
    """What leads to the object store."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    return keys | {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": address}


def make_bucket() -> fsspec.AbstractFileSystem:
    """The object store that the environment names, with the tests' bucket."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # of an earlier module, at another address
    store = fsspec.filesystem("s3")
    store.mkdir("urm")
    return store


def write_config(folder: Path, config: RunConfig) -> None:
    """A configuration, for commands and pods."""
    values = config.model_dump(mode="json")
    values["release"]["promote_timeout_seconds"] = DEADLINE_SECONDS + 40
    (folder / f"{config.name}.yaml").write_text(yaml.safe_dump(values))


def build_release(
    settings: Settings, home: Path, seed: int, change: Callable[[Path], None] | None = None, name: str = ""
) -> ClusterRelease:
    """Make a release of the tiny world, with its run directory in the object store; `change` its bundle before that."""
    name = name or f"run{seed}"
    local, run_dir = home / "runs" / name, f"{STORE}/runs/{name}"
    config = make_run(local, settings, seed=seed)
    for result in local.glob("*/result.json"):
        result.write_text(result.read_text().replace(str(local), run_dir))
    store = fsspec.filesystem("s3")
    store.put(f"{local}/", f"{run_dir.removeprefix('s3://')}/", recursive=True)
    found = run_stage("release", release_stage, config=config, run_dir=run_dir, settings=settings)
    bundle = found.outputs["bundle"]
    made = ClusterRelease(found.metrics["release"], found.metrics["version"], run_dir, bundle)
    return made if change is None else _change(made, settings, home / "changed" / name, change)


def _change(made: ClusterRelease, settings: Settings, folder: Path, change: Callable[[Path], None]) -> ClusterRelease:
    """Change a release's bundle and sign it again, so that only its content is wrong."""
    store, uri = fsspec.filesystem("s3"), f"{made.run_dir}/changed"
    store.get(f"{made.bundle.removeprefix('s3://')}/", f"{folder}/", recursive=True)
    change(folder)
    files = describe_files(folder)
    manifest = read_manifest(folder).model_copy(update={"files": files, "release": name_release("urm", files)})
    write_manifest(folder, manifest)
    store.put(f"{folder}/", f"{uri.removeprefix('s3://')}/", recursive=True)
    mlflow.set_tracking_uri(settings.tracking_uri)
    digest = hash_manifest(folder)
    with mlflow.start_run():
        version = register(folder, uri, manifest, "urm", {**manifest.tags(uri), "urm.manifest": digest})
    path = f"{made.run_dir}/release/result.json"
    with fsspec.open(path, "r") as stream:
        result = json.load(stream)
    result["outputs"]["bundle"] = uri
    result["metrics"] |= {"release": manifest.release, "version": version, "manifest": digest}
    with fsspec.open(path, "w") as stream:
        json.dump(result, stream)
    return ClusterRelease(manifest.release, version, made.run_dir, uri)


def write_kubeconfig(namespace: Kubectl, account: str, path: Path) -> Path:
    """Credentials of a service account, in place of the administrator's."""
    config = yaml.safe_load(namespace("config", "view", "--raw", "--minify", "--flatten"))
    token = namespace("create", "token", account, "--duration", "2h").strip()
    config["users"] = [{"name": account, "user": {"token": token}}]
    config["contexts"][0]["context"] |= {"user": account, "namespace": namespace.namespace}
    path.write_text(yaml.safe_dump(config))
    return path


def _reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError:
        return False
    return True


def pause_until(condition: Callable[[], object], seconds: float) -> None:
    """As `wait_until`, for conditions that cost a call of kubectl each."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition did not hold within {seconds} s")
        time.sleep(0.3)
