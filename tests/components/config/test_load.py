import re
from pathlib import Path

import pytest
import yaml

from components.config import load_config, load_named_config
from components.exceptions import ConfigError


def test_the_default_configuration_has_the_nine_tasks(configs: Path) -> None:
    config = load_config(configs / "complete_journey.yaml")
    names = "next_purchase repurchase new_item discovery long_tail in_display in_mailer discounted text_query"
    assert [task.name for task in config.tasks] == names.split()
    assert [task.name for task in config.tasks if task.needs_query] == ["text_query"]


def test_every_configuration_of_the_repository_loads(configs: Path) -> None:
    paths = sorted(configs.glob("*.yaml"))
    assert paths
    for path in paths:
        assert load_config(path).name == path.stem


def test_every_task_file_is_named_as_its_task(configs: Path) -> None:
    for path in sorted((configs / "tasks").glob("*.yaml")):
        assert yaml.safe_load(path.read_text())["name"] == path.stem


KINDS, MAX_CUTS = "'complete_journey' or 'sequences' or 'tables'", "features.split.max_train_cuts"
TABLES, SEQUENCES = {"kind": "tables", "events": "x", "items": "y"}, {"kind": "sequences", "data_dir": "x"}
LEAVE_ONE_OUT = {"kind": "leave_one_out"}
BAD_VALUES = [  # what is set, what is named, and what is expected there
    ({"baseline.sasrec.num_heads": 3}, "field 'baseline.sasrec'", "num_heads to divide the dim.* 64, not 3"),
    ({"baseline.models": ["gru4rec"]}, "field 'baseline.models.0'", ".*'sasrec'.*, got 'gru4rec'"),
    ({"urm.max_stepz": 5}, "key 'urm.max_stepz'", "one of .*max_steps.*, got an unknown key; did you mean 'm"),
    ({"source.max_userz": 5}, "key 'source.max_userz'", "one of data_dir, kind, max_users, .* 'max_users'"),
    ({"source": {"kind": "tables", "eventz": "x"}}, "field 'source.events'", "a value, got nothing"),
    ({"source": TABLES | {"event_column": {}}}, "key 'source.event_column'", "one of attributes, .*an 'event_columns'"),
    ({"source.kind": "kafka"}, "field 'source.kind'", f"{KINDS}, got 'kafka'"),
    ({"source": {}}, "field 'source.kind'", f"{KINDS}, got nothing"),
    ({"source": {"kind": "sequences"}}, "field 'source.data_dir'", "a value, got nothing"),
    ({"source": SEQUENCES | {"sequence": "y"}}, "key 'source.sequence'", "one of data_dir, item_.* mean 'sequences'"),
    ({"features.split": LEAVE_ONE_OUT}, "field 'features'", r"split\.kind leave_one_out with .*; others have dates"),
    ({"features.split.kind": "random"}, "field 'features.split.kind'", "'temporal' or 'leave_one_out', got"),
    ({"features.split.max_train_cuts": 5}, "field 'features.split'", "max_train_cuts with kind leave_one_out"),
    ({"features.split.kind": "leave_one_out"}, "field 'features.split'", "no dates and no window_days with ki"),
    ({"features.split": LEAVE_ONE_OUT | {"max_train_cuts": 0}}, f"field '{MAX_CUTS}'", "greater than 0, got 0"),
    ({"features.split": LEAVE_ONE_OUT | {"max_train_cuts": "many"}}, f"field '{MAX_CUTS}'", "a valid int.* got 'many'"),
    ({"features.held_out_query_share": 1}, "field 'features.held_out_query_share'", "less than 1, got 1"),
    ({"zzz": 1}, "key 'zzz'", "one of baseline, .*, got an unknown key; remove it"),
    ({"evaluation.gate.x": 1}, "key 'evaluation.gate.x'", "one of confidence, max_task_loss"),
    ({"urm.backbone": "none", "urm.copy_path": False}, "field 'urm'", "copy_path: true with backbone: none"),
    ({"urm.modalities": ["id", "lexcial"]}, "field 'urm.modalities.1'", "'id', 'text', .*, got 'lexcial'"),
    ({"seed": -1}, "field 'seed'", "greater than or equal to 0, got -1"),
    ({"evaluation.bootstrap_samples": 150}, "field 'evaluation'", "at least 360 bootstrap_samples for 9 tasks"),
    ({"evaluation.gate.confidence": 0.999}, "field 'evaluation'", "at least 18000 bootstrap_samples for 9 tasks"),
    ({"urm.history_length": 300}, "field 'urm'", "a copy_length of at least history_length, 300, not 256"),
    ({"urm.max_steps": 0}, "field 'urm.max_steps'", "greater than 0, got 0; set a valid value"),
    ({"urm.combine": "sum"}, "field 'urm.combine'", "'max', 'logsumexp' or 'mean', got 'sum'"),
    ({"urm": 5}, "field 'urm'", "a valid dictionary"),
    ({"release.model_name": "shop/urm"}, "field 'release.model_name'", "a value that should match .*, got 'shop/urm'"),
    ({"release.model_name": "shop's"}, "field 'release.model_name'", "a value that should match pattern .*shop's"),
    ({"release.model_name": "u" * 51}, "field 'release.model_name'", "a value that should have at most 50 characters"),
    ({"name": "A b"}, "field 'name'", "a value that should match pattern .*, got 'A b'"),
    ({"features.split.end": "2017-12-18T05:00:00"}, "field 'features.split.end'", "a value that should have t"),
    ({"features.split.end": "2017-01-01T00:00:00Z"}, "field 'features.split'", "train_start < validation_sta"),
    ({"tasks": []}, "field 'tasks'", "a value that should have at least 1 item"),
    ({"tasks": "new_item"}, "field 'tasks'", "a valid tuple, got 'new_item'"),
    ({"tasks": [5]}, "field 'tasks.0'", "a valid dictionary or instance of Task, got 5"),
    ({"tasks": ["new_item", "new_item"]}, "field 'tasks'", "each task once, not 'new_item' again"),
    ({"name.x": 1}, "override 'name.x'", "a path through sections, got the plain value 'name' on the way"),
]


@pytest.mark.parametrize(("overrides", "name", "expected"), BAD_VALUES, ids=[str(values) for values, *_ in BAD_VALUES])
def test_a_bad_value_is_named_with_file_field_and_value(
    configs: Path, overrides: dict[str, object], name: str, expected: str
) -> None:
    message = f"{re.escape(name)}: expected {expected}"
    path = configs / "complete_journey.yaml"
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "override" in message or str(path) in str(caught.value)


def test_a_mistake_in_a_task_file_names_that_file(configs: Path) -> None:
    path = configs / "tasks" / "long_tail.yaml"
    content = yaml.safe_load(path.read_text())
    content["target"]["max_popularity_quantile"] = 3
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"'target\.max_popularity_quantile': expected less than.* 1, got 3") as e:
        load_config(configs / "complete_journey.yaml")
    assert str(path) in str(e.value)

    content["target"] = {"max_popularity": 0.5}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"key 'target\.max_popularity': .* did you mean 'max_popularity_quantile'"):
        load_config(configs / "complete_journey.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [1", "expected valid YAML, got .*line 1.*; fix the file at the line named"),
        (b"recall: {k: 5}\nname: x\nrecall: {}", "expected valid YAML, got key 'recall' a second time.*line 3"),
        (b"- a\n- b", "expected a mapping of keys, got list"),
        (b"", "expected a mapping of keys, got NoneType"),
        (b"name: caf\xe9", "expected UTF-8 text"),
    ],
)
def test_an_unreadable_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_task(configs: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml: expected a readable YAML file, got No such file or directory"):
        load_config(configs / "nope.yaml")
    with pytest.raises(ConfigError, match=r"tasks/nope\.yaml: expected a readable YAML file, got No such file"):
        load_config(configs / "complete_journey.yaml", {"tasks": ["nope"]})


def test_overrides_of_the_command_line(configs: Path) -> None:
    config = load_named_config("complete_journey", configs, ["urm.max_steps=7", "urm.modalities=[text]", "seed=3"])
    assert (config.urm.max_steps, config.urm.modalities, config.seed) == (7, ("text",), 3)
    assert load_named_config(str(configs / "complete_journey.yaml"), Path("elsewhere")).seed == 0
    with pytest.raises(ConfigError, match=r"option --set 'urm\.max_steps': expected KEY=VALUE, got no '='"):
        load_named_config("complete_journey", configs, ["urm.max_steps"])
    with pytest.raises(ConfigError, match=r"option --set 'urm\.modalities=\[1': expected a value in YAML"):
        load_named_config("complete_journey", configs, ["urm.modalities=[1"])


@pytest.mark.parametrize(
    ("target", "name", "expected"),
    [
        ({"query_category_level": -2}, ".query_category_level", "greater than or equal to -1"),
        ({"query_category_level": 0, "query_title_words": 2}, "", "query_category_level or query_title_w.*, not both"),
        ({"query_title_words": 2, "held_out_query": True}, "", "held_out_query beside query_category_level only"),
    ],
)
def test_filters_that_contradict_each_other(configs: Path, target: dict[str, object], name: str, expected: str) -> None:
    path = configs / "tasks" / "text_query.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"target": target}))
    with pytest.raises(ConfigError, match=f"field 'target{name}': expected {expected}") as caught:
        load_config(configs / "complete_journey.yaml")
    assert str(path) in str(caught.value)
