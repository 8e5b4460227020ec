"""Where a run happens: addresses, namespaces and credentials, from URM_* environment variables only.

What a run *is* stands in `components.config`. No other module reads the environment; `child_environment` says which
part of it a process of this project hands on to another.
"""

import os
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from components.exceptions import ConfigError

# Patterns of variables that every child process inherits. Anything else needs a place here or among the settings.
INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "LC_*", "TZ", "TMPDIR", "XDG_CACHE_HOME"),
    *("PYTHON*", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD", "MALLOC_*"),
    *("OMP_*", "OPENBLAS_*", "MKL_*", "KMP_*", "NUMEXPR_*", "CUDA_*", "NVIDIA_*", "NCCL_*", "TORCH*", "PYTORCH_*"),
    *("HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("JAVA_HOME", "SPARK_*", "PYSPARK_*"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("AWS_*", "GOOGLE_*", "AZURE_*", "FSSPEC_*"),  # fsspec: credentials of the stores that hold run directories
    "OTEL_*",
)
# The same for processes that need the credentials of a service.
INHERITED_BY_SERVICE = {
    "mlflow": ("MLFLOW_*",),
    "airflow": ("AIRFLOW*", "KUBECONFIG"),
    "feast": ("FEAST_*",),
    "recall": ("KUBECONFIG", "KUBERNETES_SERVICE_*"),  # for a promotion; within a cluster the latter is the address
}
_SERVICE = "credentials_of"  # marks a field whose value may hold credentials, with the service that they open


class Settings(BaseSettings):
    """Environment of one process; every field is the variable `URM_<FIELD>`, but for those that others define."""

    model_config = SettingsConfigDict(env_prefix="URM_", frozen=True, extra="ignore")

    home: Path = Field(default=Path(".urm"), description="State of the local services and runs.")
    runs_uri: str = Field(default="", description="Root of the run directories; empty: <home>/runs.")
    cache_dir: str = Field(default="", description="Caches keyed by content (converted backbone, text vectors).")
    cache_uri: str = Field(
        default="",
        description="Shared copy of these caches, a folder or an object store; empty: none.",
    )
    config: str = Field(default="complete_journey", description="Run configuration of commands without --config.")
    configs_dir: Path = Field(default=Path("configs"), description="Folder of the YAML configurations.")
    feature_repo_dir: Path = Field(default=Path("feature_repo"), description="Folder of the Feast definitions.")
    feature_environment: Literal["embedded", "production"] = "embedded"
    mlflow_uri: str = Field(
        default="",
        description="MLflow tracking server; empty: SQLite under <home>.",
        json_schema_extra={_SERVICE: "mlflow"},
    )
    mlflow_public_url: str = Field(default="", description="MLflow address shown to people.")
    airflow_url: str = Field(default="", description="Airflow API server, as people and tasks reach it.")
    airflow_dag_id: str = Field(default="", description="Set by the DAG for its tasks.")
    airflow_run_id: str = Field(default="", description="Set by the DAG for its tasks.")
    airflow_username: str = "admin"
    airflow_password: SecretStr = Field(default=SecretStr(""), json_schema_extra={_SERVICE: "airflow"})
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", json_schema_extra={_SERVICE: "redis"})
    allowed_uris: str = Field(
        default="",
        description="Prefixes of bundles and feature stores, with commas; empty: anywhere.",
    )
    api_tokens_file: Path | None = Field(default=None, description="Who may use the recall API; none: anybody.")
    api_url: str = Field(default="", description="Recall API, as people and the smoke check of a promotion reach it.")
    api_token: SecretStr = Field(
        default=SecretStr(""),
        description="Token for the smoke check of a promotion, if the recall API asks for one.",
        json_schema_extra={_SERVICE: "recall"},
    )
    deploy_to: Literal["local", "kubernetes"] = Field(
        default="local", description="What a promotion changes: the workers of this machine or two Deployments."
    )
    release: str = Field(default="", description="Release of a pod's workers, from its template; empty: none yet.")
    release_bundle: str = Field(default="", description="URI of that release's bundle.")
    release_manifest: str = Field(default="", description="SHA-256 of that bundle's manifest.json.")
    release_order: str = Field(default="", description="Order of that release's publication, a decimal number.")
    executor: Literal["local", "kubernetes"] = Field(
        default="local", description="How Airflow runs a stage: a local process or a pod."
    )
    image: str = Field(default="urm:latest", description="Container image of the stages.")
    pods_file: Path | None = Field(
        default=None, description="Table of what the pods of stages need; none: k8s/jobs/pods.yaml beside the DAGs."
    )
    namespace: str = Field(default="urm", description="Kubernetes namespace of the pods and Deployments.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int = Field(default=0, ge=0, description="Threads of torch, faiss and DuckDB; 0: every core allowed.")
    shard_model: bool = Field(
        default=False, description="Split the weights over the processes of `sft` (FSDP2) instead of copying them."
    )
    checkpoint_minutes: float = Field(
        default=10, gt=0, description="Most minutes between two checkpoints of a training; evaluations save, too."
    )
    engine: Literal["duckdb", "spark"] = Field(
        default="duckdb", description="Engine of `validate` and `features`; `ingest` and `encode` need DuckDB."
    )
    engine_memory: str = Field(
        default="",
        pattern=r"^(\d+(\.\d+)? ?([KMGT]i?B))?$",
        description="Memory limit of the engine, e.g. 8GB; what exceeds it goes to disk. Empty: half of what is there.",
    )
    spark_master: str = Field(
        default="local[*]",
        description="Where Spark runs; empty: where spark-submit or spark-defaults.conf says.",
    )
    spark_driver_host: str = Field(
        default="",
        description="Address at which executors on Kubernetes reach this process, its pod's; empty: Spark's guess.",
    )
    spark_driver_pod: str = Field(
        default="", description="Pod of this process, with which executors on Kubernetes end; empty: none."
    )
    otlp_endpoint: str = Field(
        default="", validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT", description="Where traces of the runtime go."
    )
    process: int = Field(default=0, ge=0, validation_alias="RANK", description="Number of this process, by torchrun.")
    processes: int = Field(default=1, gt=0, validation_alias="WORLD_SIZE", description="Processes of a stage.")

    @property
    def runs_root(self) -> str:
        """URI under which run directories are made."""
        return self.runs_uri or str((self.home / "runs").absolute())

    def run_dir(self, run_id: str) -> str:
        """URI of the run directory of a DAG run: its id, with characters unsafe in paths replaced."""
        name = re.sub(r"[^\w.-]+", "-", run_id)
        return f"{self.runs_root.rstrip('/')}/{name}"

    def find_run_dir(self, name: str) -> str:
        """Run directory as a command line names it: a path or URI, with a slash in it, or a name under the root."""
        return name if "/" in name else self.run_dir(name)

    def run_page(self, experiment_id: str, run_id: str) -> str:
        """Address of an MLflow run's page, for people; it opens in the view for model training."""
        base = hide_credentials(self.mlflow_public_url or self.tracking_uri).rstrip("/")
        return f"{base}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"

    def require_allowed(self, uri: str) -> None:
        """Refuse to read a bundle or a feature store from elsewhere than `allowed_uris`.

        Raises:
            ConfigError: It lies elsewhere.
        """

        def locate(address: str) -> str:
            return address if "://" in address else str(Path(address).resolve())

        prefixes = [locate(prefix.strip()).rstrip("/") for prefix in self.allowed_uris.split(",") if prefix.strip()]
        place = locate(uri)
        if prefixes and (".." in place.split("/") or not any(f"{place}/".startswith(f"{one}/") for one in prefixes)):
            raise ConfigError(
                f"address {uri}",
                expected="one below " + " or ".join(prefixes),
                got="another",
                remedy="keep releases there, or add its prefix to URM_ALLOWED_URIS",
            )

    @property
    def cache_path(self) -> Path:
        """Local folder of the content-keyed caches."""
        return Path(self.cache_dir or self.home / "cache").absolute()

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking URI."""
        return self.mlflow_uri or f"sqlite:///{(self.home / 'mlflow' / 'mlflow.db').absolute()}"


def hide_credentials(uri: str) -> str:
    """The URI without user and password: for messages, links, and whatever is stored."""
    return re.sub(r"(?<=://)[^/?#]*@", "", uri, count=1)


def _variable(place: str) -> str:
    """Name of the environment variable of a field, or of the alias that pydantic names."""
    return f"URM_{place.upper()}" if place in Settings.model_fields else place


def setting_variables(credentials: Collection[str] = ()) -> dict[str, str]:
    """Variables of this process that are settings; without any `credentials`, the result may be shown to people.

    `credentials` are the services whose credentials are included: see `child_environment`.
    """
    found = {}
    for name, field in Settings.model_fields.items():
        variable = str(field.validation_alias or _variable(name))
        extra = field.json_schema_extra
        service = extra.get(_SERVICE) if isinstance(extra, dict) else None
        if variable in os.environ and (service is None or service in credentials):
            found[variable] = os.environ[variable]
    return found


def child_environment(credentials: Collection[str]) -> dict[str, str]:
    """Variables of this process that a stage or a service of the project inherits.

    `credentials` are the services whose credentials it needs: `airflow`, `feast`, `mlflow`, `recall`, `redis`.
    """
    patterns = [*INHERITED, *(pattern for name in credentials for pattern in INHERITED_BY_SERVICE.get(name, ()))]
    inherited = {
        name: value for name, value in os.environ.items() if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    return inherited | setting_variables(credentials)


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Read the environment once a process.

    What `urm up` left in `<home>/services.env` leads to the services of this machine; the environment goes before it.

    Raises:
        ConfigError: A variable has a value that does not fit.
    """
    try:
        home = Settings().home
        return Settings(_env_file=home / "services.env")
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"setting {_variable(str(first['loc'][0]))}",
            expected=first["msg"].removeprefix("Input should be "),
            got=repr(first["input"]),
            remedy="change or unset the variable",
        ) from None
