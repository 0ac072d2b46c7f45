"""Names of Megatron-Bridge that it does not promise; tests/private_names has all others."""

import pytest

from tests.private_names import listed
from tests.private_names.test_private_names import ELSEWHERE

ROWS = [row for row in listed.rows() if row.library in ELSEWHERE]


def test_there_are_some():
    assert {row.library for row in ROWS} == set(ELSEWHERE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.names[0])
def test_the_installed_release_has_them(row):
    assert listed.is_there(row)
    for name in row.names:
        listed.resolve(name)
