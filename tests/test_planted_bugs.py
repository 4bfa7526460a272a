"""The suite must turn red for each bug of planted_bugs.py."""

import planted_bugs
import pytest


@pytest.mark.slow
def test_the_selection_is_green_without_a_bug():
    assert not planted_bugs.is_red(None)


@pytest.mark.slow
@pytest.mark.parametrize("name", planted_bugs.BUGS)
def test_a_planted_bug_turns_the_suite_red(name):
    assert planted_bugs.is_red(planted_bugs.BUGS[name])
