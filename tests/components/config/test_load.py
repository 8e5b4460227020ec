from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from components.config import load_config, load_named_config
from components.exceptions import ConfigError


def test_the_default_configuration_has_the_nine_tasks(configs: Path) -> None:
    config = load_config(configs / "complete_journey.yaml")
    assert [task.name for task in config.tasks] == [
        "next_purchase",
        "repurchase",
        "new_item",
        "discovery",
        "long_tail",
        "in_display",
        "in_mailer",
        "discounted",
        "text_query",
    ]
    assert [task.name for task in config.tasks if task.needs_query] == ["text_query"]


def test_every_configuration_of_the_repository_loads(configs: Path) -> None:
    paths = sorted(configs.glob("*.yaml"))
    assert paths
    for path in paths:
        assert load_config(path).name == path.stem


def test_every_task_file_is_named_as_its_task(configs: Path) -> None:
    for path in sorted((configs / "tasks").glob("*.yaml")):
        assert yaml.safe_load(path.read_text())["name"] == path.stem


BAD_VALUES = [
    ({"baseline.sasrec.num_heads": 3}, r"field 'baseline\.sasrec': expected num_heads to divide the dim.* 64, not 3"),
    ({"baseline.models": ["gru4rec"]}, r"field 'baseline\.models\.0': expected .*'sasrec'.*, got 'gru4rec'"),
    ({"urm.max_stepz": 5}, r"key 'urm\.max_stepz': expected one of .*max_steps.*, got an unknown key; did you mean 'm"),
    ({"source.max_userz": 5}, r"key 'source\.max_userz': expected one of data_dir, kind, max_users, .* 'max_users'"),
    ({"source": {"kind": "tables", "eventz": "x"}}, r"field 'source\.events': expected a value, got nothing"),
    (
        {"source": {"kind": "tables", "events": "x", "items": "y", "event_column": {}}},
        r"key 'source\.event_column': expected one of attributes, .*; did you mean 'event_columns'",
    ),
    (
        {"source.kind": "kafka"},
        r"field 'source\.kind': expected 'complete_journey' or 'sequences' or 'tables', got 'kafka'",
    ),
    ({"source": {}}, r"field 'source\.kind': expected 'complete_journey' or 'sequences' or 'tables', got nothing"),
    ({"source": {"kind": "sequences"}}, r"field 'source\.data_dir': expected a value, got nothing"),
    (
        {"source": {"kind": "sequences", "data_dir": "x", "sequence": "y"}},
        r"key 'source\.sequence': expected one of data_dir, item_columns, items, .*; did you mean 'sequences'",
    ),
    (
        {"features.split": {"kind": "leave_one_out"}},
        r"field 'features': expected split\.kind leave_one_out with source\.kind sequences only; others have dates",
    ),
    ({"features.split.kind": "random"}, r"field 'features\.split\.kind': expected 'temporal' or 'leave_one_out', got"),
    ({"features.split.max_train_cuts": 5}, r"field 'features\.split': expected max_train_cuts with kind leave_one_out"),
    (
        {"features.split.kind": "leave_one_out"},
        r"field 'features\.split': expected no dates and no window_days with ki",
    ),
    (
        {"features.split": {"kind": "leave_one_out", "max_train_cuts": 0}},
        r"field 'features\.split\.max_train_cuts': expected greater than 0, got 0",
    ),
    (
        {"features.split": {"kind": "leave_one_out", "max_train_cuts": "many"}},
        r"field 'features\.split\.max_train_cuts': expected a valid integer.*, got 'many'",
    ),
    ({"features.held_out_query_share": 1}, r"field 'features\.held_out_query_share': expected less than 1, got 1"),
    ({"zzz": 1}, r"key 'zzz': expected one of baseline, .*, got an unknown key; remove it"),
    ({"evaluation.gate.x": 1}, r"key 'evaluation\.gate\.x': expected one of confidence, max_task_loss"),
    ({"urm.max_steps": 0}, r"field 'urm\.max_steps': expected greater than 0, got 0; set a valid value"),
    ({"urm.combine": "sum"}, r"field 'urm\.combine': expected 'max', 'logsumexp' or 'mean', got 'sum'"),
    ({"urm": 5}, r"field 'urm': expected a valid dictionary"),
    ({"name": "A b"}, r"field 'name': expected a value that should match pattern .*, got 'A b'"),
    (
        {"features.split.end": "2017-12-18T05:00:00"},
        r"field 'features\.split\.end': expected a value that should have t",
    ),
    ({"features.split.end": "2017-01-01T00:00:00Z"}, r"field 'features\.split': expected train_start < validation_sta"),
    ({"tasks": []}, r"field 'tasks': expected a value that should have at least 1 item"),
    ({"tasks": "new_item"}, r"field 'tasks': expected a valid tuple, got 'new_item'"),
    ({"tasks": [5]}, r"field 'tasks\.0': expected a valid dictionary or instance of Task, got 5"),
    ({"tasks": ["new_item", "new_item"]}, r"field 'tasks': expected each task once, not 'new_item' again"),
    ({"name.x": 1}, r"override 'name\.x': expected a path through sections, got the plain value 'name' on the way"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_VALUES, ids=[str(values) for values, _ in BAD_VALUES])
def test_a_bad_value_is_named_with_file_field_and_value(
    configs: Path, overrides: dict[str, object], message: str
) -> None:
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
    with pytest.raises(
        ConfigError, match=r"field 'target\.max_popularity_quantile': expected less than.* 1, got 3"
    ) as e:
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
    ("target", "message"),
    [
        ({"query_category_level": -2}, r"field 'target\.query_category_level': expected greater than or equal to -1"),
        (
            {"query_category_level": 0, "query_title_words": 2},
            "field 'target': expected query_category_level or query_title_words, not both",
        ),
        (
            {"query_title_words": 2, "held_out_query": True},
            "field 'target': expected held_out_query beside query_category_level only",
        ),
    ],
)
def test_filters_that_contradict_each_other(configs: Path, target: dict[str, object], message: str) -> None:
    path = configs / "tasks" / "text_query.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"target": target}))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(configs / "complete_journey.yaml")
    assert str(path) in str(caught.value)
