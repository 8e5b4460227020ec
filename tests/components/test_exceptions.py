import pytest

from components import exceptions
from components.exceptions import DataError, UnavailableError, UrmError, UserError


def test_a_message_is_one_sentence_of_subject_expected_got_remedy() -> None:
    error = DataError("table x", expected="rows", got="none", remedy="check the source")
    assert str(error) == "table x: expected rows, got none; check the source."


@pytest.mark.parametrize(
    ("got", "text"),
    [
        (ValueError("first line\n   second line."), "got first line second line; "),
        (0, "got 0; "),
        (OSError(), "got nothing; "),
    ],
)
def test_what_other_libraries_say_is_made_to_fit_one_line(got: object, text: str) -> None:
    assert text in str(UnavailableError("store", expected="an answer", got=got, remedy="try again"))


def test_exit_codes_tell_a_mistake_from_a_fault() -> None:
    kinds = [kind for kind in vars(exceptions).values() if isinstance(kind, type) and issubclass(kind, UrmError)]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    assert codes.pop("UrmError") == 1
    assert codes.pop("UnavailableError") == 3
    assert codes.pop("StoppedError") == 143
    assert set(codes.values()) == {2}
    assert all(issubclass(getattr(exceptions, name), UserError) for name in codes)
    assert issubclass(UserError, ValueError)
