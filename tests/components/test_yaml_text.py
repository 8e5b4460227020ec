import pytest
import yaml

from components.yaml_text import parse


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "b: {c: 1, d: 2, c: 1}", "- x: 1\n  'x': 2\n"])
def test_a_key_that_stands_twice_is_named_with_its_line(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match=r"(?s)key '[acx]' a second time.*line \d"):
        parse(text)


def test_what_is_merged_may_be_replaced() -> None:
    text = "a: &a {left: 1, right: 1}\nb: &b {<<: *a, right: 2}\nc: {d: {<<: *b, left: 3}, 1: one, '1': text}\n"
    assert parse(text)["c"] == {"d": {"left": 3, "right": 2}, 1: "one", "1": "text"}
    assert parse("") is None
