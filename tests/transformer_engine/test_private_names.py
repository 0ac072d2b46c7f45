"""Private names of the libraries that only this environment has (tests/project/private_names)."""

import sys
from unittest import mock

import pytest

from tests.project.private_names import listed

ROWS = [row for row in listed.rows() if row.library in listed.ELSEWHERE]


def test_the_table_has_such_rows():
    assert {row.library for row in ROWS} == set(listed.ELSEWHERE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.names[0])
def test_the_installed_release_has_them(row, monkeypatch):
    # Bridge's training imports its data loaders, which are not installed.
    monkeypatch.setitem(sys.modules, "megatron.energon", mock.MagicMock(name="megatron.energon"))
    assert listed.is_there(row)
    for name in row.names:
        listed.resolve(name)
