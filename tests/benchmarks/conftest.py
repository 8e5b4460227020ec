from collections.abc import Callable, Sequence
from importlib import import_module

import pytest


@pytest.fixture
def unknown_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, Sequence[str]], list[str]]:
    """Of the words after a benchmark's module, the options that its help does not show."""

    def unknown(module: str, words: Sequence[str]) -> list[str]:
        monkeypatch.setattr("sys.argv", [module, "--help"])
        with pytest.raises(SystemExit):
            import_module("benchmarks.serving.__main__" if module == "benchmarks.serving" else module).main()
        known = capsys.readouterr().out
        assert known.startswith("usage: ")
        return [word for word in words if word.startswith("--") and word not in known]

    return unknown
