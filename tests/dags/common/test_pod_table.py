import pytest

from components.exceptions import ConfigError
from components.flow import STAGES, Resources
from components.settings import Settings

RESOURCES = Resources(hours=2, memory="16Gi")


@pytest.fixture
def read(tmp_path):
    from dags.common.pod_table import read_pod_needs

    def fill(text, task_id="features"):
        path = tmp_path / "pods.yaml"
        path.write_text(text)
        return read_pod_needs(task_id, RESOURCES, Settings(pods_file=path, image="urm:1"))

    return fill


def test_a_block_goes_before_the_defaults_and_these_before_the_flow(read):
    needs = read("defaults: {cpu: 3, queue_hours: 2, disruptions: 1}\nfeatures: {cpu: 500m, image: urm:2}")
    assert (needs.cpu, needs.queue_hours, needs.disruptions, needs.image) == ("500m", 2, 1, "urm:2")
    assert (needs.memory, needs.hours, needs.gpus) == ("16Gi", 2, 0)
    assert read("defaults: {cpu: 3}\nfeatures:").cpu == "3"
    assert read("features: {memory: 8388608Ki}").memory == "8388608Ki"
    assert (read("").cpu, read("").image) == ("2", "urm:1")


def test_a_tolerations_words_are_those_of_a_pod(read):
    (found,) = read("features: {tolerations: [{key: gpu, effect: NoExecute, tolerationSeconds: 9}]}").tolerations
    assert (found.operator, found.toleration_seconds) == ("Equal", 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "features: {memmory: 8Gi}",
            "features.memmory: expected one of image, hours, cpu, .*, got another field; correct",
        ),
        ("features: {memory: much}", "features.memory: expected String should match .*, got 'much'; correct"),
        ("features: {memory: 8388608ki}", "features.memory: expected String should match"),  # nor does Kubernetes
        ("features: {gpus: -1}", "features.gpus: expected greater than or equal to 0, got -1; correct"),
        ("features: {tolerations: [{effect: Never}]}", "features.tolerations.0.effect: expected 'NoSchedule'"),
        ("fetures: {cpu: 1}", r"expected blocks of defaults, ingest, .*, got \['fetures'\]; correct"),
        ("features: {nodes: 2}", "features.nodes: expected 1, got 2; correct"),
        ("- features", "expected blocks of .*, got list; correct"),
        ("features: [", "expected a readable YAML file, got "),
        ("features: {cpu: 1, cpu: 2}", "expected a readable YAML file, got key 'cpu' a second time"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(text, message, read):
    with pytest.raises(ConfigError, match=message) as caught:
        read(text)
    assert str(caught.value).endswith("correct the table that URM_PODS_FILE names.")


def test_the_back_fills_block_has_nothing_that_a_job_cannot_have(read):
    assert read("defaults: {queue_hours: 3}\nbackfill: {gpus: 1}", "backfill").gpus == 1
    with pytest.raises(ConfigError, match=r"backfill: expected no cache_claim, .* cannot have, got queue_hours; corr"):
        read("backfill: {queue_hours: 3}", "backfill")


def test_the_repositorys_table_gives_training_shared_memory_and_gpu_nodes():
    from dags.common.pod_table import read_pod_needs

    needs = {stage: read_pod_needs(stage, spec.resources, Settings()) for stage, spec in STAGES.items()}
    with_gpu = {stage for stage, found in needs.items() if found.gpus}
    assert with_gpu == {stage for stage, found in needs.items() if found.shared_memory and found.tolerations} == {"sft"}
    variant = read_pod_needs("variant", STAGES["sft"].resources, Settings())
    assert variant == needs["sft"]
