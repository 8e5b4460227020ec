from pathlib import Path

import pytest

from components.config import RunConfig, UrmConfig, load_config
from components.exceptions import ConfigError


def test_a_configuration_cannot_be_changed(configs: Path) -> None:
    config = load_config(configs / "complete_journey.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.urm.max_steps = 1  # type: ignore[misc]


def test_an_unknown_task_names_the_known(configs: Path) -> None:
    config = load_config(configs / "complete_journey.yaml", {"tasks": ["new_item", "discovery"]})
    assert config.task("discovery").name == "discovery"
    message = "task: expected one of new_item, discovery, got 'x'; name a task of this run"
    with pytest.raises(ConfigError, match=message):
        config.task("x")


def test_the_fingerprint_sees_its_sections_and_the_seed_only(configs: Path) -> None:
    path = configs / "complete_journey.yaml"

    def prints(overrides: dict[str, object]) -> tuple[str, str]:
        config = load_config(path, overrides)
        return config.fingerprint(("urm",)), config.fingerprint(("items",))

    urm, items = prints({})
    assert prints({}) == (urm, items)
    written_out = UrmConfig().num_user_vectors  # the file leaves this default unsaid
    assert prints({"urm.num_user_vectors": written_out}) == (urm, items)
    changed, same = prints({"urm.num_user_vectors": written_out + 1})
    assert changed != urm
    assert same == items
    assert not set(prints({"seed": 1})) & {urm, items}


def test_the_fingerprint_of_tasks_sees_prompts_and_no_descriptions(configs: Path) -> None:
    config = load_config(configs / "complete_journey.yaml")

    def fingerprint(**changed: str) -> str:
        tasks = tuple(task.model_copy(update=changed) for task in config.tasks)
        return config.model_copy(update={"tasks": tasks}).fingerprint(("tasks",))

    assert fingerprint(description="In other words.") == config.fingerprint(("tasks",))
    assert fingerprint(prompt="In other words.") != config.fingerprint(("tasks",))


def test_leave_one_out_is_read_again_from_what_it_writes(configs: Path) -> None:
    config = load_config(configs / "amazon_beauty.yaml", {"features.split": {"kind": "leave_one_out"}})
    assert config.features.split.max_train_cuts == 50
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
