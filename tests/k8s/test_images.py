"""Policies of the Dockerfile and of what it copies."""

import re
from fnmatch import fnmatch
from typing import NamedTuple

import pytest
import yaml

from tests.test_extras import closure
from tests.worlds import REPOSITORY

K8S = REPOSITORY / "k8s"
DOCKERFILE, INSTALL = ((K8S / "images" / name).read_text() for name in ("Dockerfile", "install"))
POD = yaml.safe_load((K8S / "jobs" / "stage-pod.yaml").read_text())["spec"]
LABELS = {"title", "version", "revision", "source", "licenses"}
ORCHESTRATION = {"apache-airflow", "apache-airflow-core", "apache-airflow-task-sdk"}
TRAINING = {
    "mlflow",
    "mlflow-skinny",
    "great-expectations",
    "accelerate",
    "duckdb",
    "kubernetes",
}
MODEL = {"torch", "transformers", "faiss-cpu", "feast", "pandas", "scipy", "scikit-learn"}
ABSENT = {
    "pipeline": ORCHESTRATION | {"pyspark"},
    "pipeline-spark": ORCHESTRATION,
    "recall-worker": ORCHESTRATION | TRAINING,
    "recall-api": ORCHESTRATION | TRAINING | MODEL,
}


class Stage(NamedTuple):
    """A stage of the Dockerfile: what it starts from, and its instructions."""

    base: str
    steps: list[tuple[str, str]]


def read_stages() -> dict[str, Stage]:
    """Stages by name, in order."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    stages: dict[str, Stage] = {}
    for word, rest in (line.split(" ", 1) for line in text.splitlines() if line):
        if word == "FROM":
            base, name = rest.split(" AS ")
            steps = stages.setdefault(name, Stage(base, [])).steps
        elif stages:
            steps.append((word, rest))
    return stages


STAGES = read_stages()


def lineage(name: str) -> list[tuple[str, str]]:
    """Instructions of a stage and of all that it starts from."""
    base, steps = STAGES[name]
    return [*(lineage(base) if base in STAGES else []), *steps]


def extras_of(target: str) -> set[str]:
    """Extras of the project that an image installs."""
    named = re.findall(r"'\.\[(.*?)\]'", " ".join(rest for word, rest in lineage(target) if word == "RUN"))
    return {extra for extras in named for extra in extras.split(",")}


def test_there_is_a_target_per_image_of_the_pods():
    images = {each for path in K8S.rglob("*.yaml") for each in re.findall(r"image: (urm-\S+)", path.read_text())}
    version = re.search(r'__version__ = "(.*)"', (REPOSITORY / "components" / "__init__.py").read_text()).group(1)
    assert images == {f"urm-{target}:{version}" for target in ABSENT}
    assert set(ABSENT) <= set(STAGES)


def test_every_stage_starts_from_the_base_that_the_builder_names():
    assert re.match(r"(#.*\n)*ARG BASE=python:3\.1[123]\S*\n", DOCKERFILE)
    assert all(stage.base in {"${BASE}", *list(STAGES)[:at]} for at, stage in enumerate(STAGES.values()))


@pytest.mark.parametrize("target", ABSENT)
def test_an_image_runs_as_the_user_of_the_pods_and_says_what_it_is(target):
    security, steps = POD["securityContext"], STAGES[target].steps
    assert ("USER", f"{security['runAsUser']}:{security['runAsGroup']}") in steps
    assert not any(word in {"RUN", "ADD"} for word, _ in steps)  # nothing but our code above the dependencies
    assert ("ENTRYPOINT", '["urm"]') in steps
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="(.*?)"', dict(steps)["LABEL"]))
    assert set(labels) == LABELS
    assert labels["title"] == f"urm-{target}"
    filled = {labels[name] for name in ("version", "revision", "source")}
    assert filled == {f"${{{argument}}}" for word, argument in steps if word == "ARG"}


@pytest.mark.parametrize("target", ABSENT)
def test_an_image_holds_what_its_role_needs_and_no_more(target):
    extras = extras_of(target)
    assert "s3" in extras
    assert not ABSENT[target] & set().union(*map(closure, extras))


def test_no_index_can_shadow_a_name_of_another():
    installs = [rest for stage in STAGES.values() for word, rest in stage.steps if word == "RUN" and "install" in rest]
    indexed = [rest for rest in installs if "index" in rest]
    assert [re.search(r"\./install (.*)", rest).group(1) for rest in indexed] == [
        '--no-compile --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch'
    ]
    for text in (DOCKERFILE, INSTALL):
        assert not re.search(r"extra-index|find-links|://", text)


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: the last line that matches it or a folder above it decides."""
    ignored = False
    for line in (REPOSITORY / ".dockerignore").read_text().split("\n"):
        pattern = line.removeprefix("!").replace("**/", "*")
        parts = path.split("/")
        if pattern and not line.startswith("#") and any(fnmatch("/".join(parts[:end]), pattern) for end in range(1, 9)):
            ignored = not line.startswith("!")
    return ignored


def test_images_copy_what_exists_and_the_context_holds_nothing_else():
    copies = [rest.split() for stage in STAGES.values() for word, rest in stage.steps if word == "COPY"]
    sources = {source for words in copies if not words[0].startswith("--from") for source in words[:-1]}
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert not is_ignored(source), source
    for path in ("README.md", ".git/config", ".venv/bin/urm", "tests/test_docs.py", "k8s/README.md", "secrets.yaml"):
        assert is_ignored(path), path
    assert is_ignored("components/__pycache__/flow.cpython-311.pyc")
    assert not is_ignored("components/recall/api/app.py")
