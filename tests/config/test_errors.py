"""Refusals are what Python's callers expect of one, ValueErrors, and what people read: a sentence and an exit code."""

import pytest

from fullarc.cli import main
from fullarc.config.errors import FullarcError, Interrupted, UsageError
from fullarc.config.model import preset


def test_a_refusal_is_a_value_error_with_its_sentence() -> None:
    for kind, code in ((FullarcError, 3), (UsageError, 2), (Interrupted, 4)):
        assert issubclass(kind, ValueError) and kind.exit_code == code
    assert str(FullarcError("It is wrong.", "Do this.")) == "It is wrong. Do this."
    with pytest.raises(ValueError, match="no model size"):
        preset("3m")


def test_the_command_line_says_it_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "stages.sft.stpes"]) == UsageError.exit_code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
