"""YAML as people write it: a key that stands twice in a mapping is a mistake."""

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's own takes the last of equal keys, without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} a second time", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def parse(text: str) -> Any:
    """The content of a document.

    Raises:
        yaml.YAMLError: It is no valid YAML, or has a key twice.
    """
    return yaml.load(text, _Loader)  # noqa: S506  # a safe one
