"""The list of private names against the package's text, the installed libraries and the tests."""

import re

import pytest

from tests.project.private_names import compare, listed, lookups, scan, syntax
from tests.upstream import tables

ROWS = listed.rows()
FILES = {file for file, _ in tables.rows()}


def words() -> dict[str, set[str]]:
    """File of the list -> what it names; a file that is gone names nothing."""
    files = {file for row in ROWS for file in row.files}
    paths = {file: scan.path_of(file) for file in files}
    texts = {file: path.read_text() for file, path in paths.items() if path.exists()}
    return {file: syntax.words(text) for file, text in texts.items()}


def test_every_use_is_listed():
    assert compare.unlisted(scan.uses(), ROWS) == []


def test_every_row_is_used():
    assert compare.unused(scan.uses(), ROWS, words()) == []


def test_every_table_of_replacements_is_listed():
    listed_of = {
        file: {n for row in ROWS if file in row.files for n in row.names} for file in FILES
    }
    rows = list(scan.rows())
    assert {use.file for use in rows} == FILES
    assert [str(use) for use in rows if use.name not in listed_of[use.file]] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.names[0])
def test_the_installed_release_has_what_it_should(row):
    should = listed.is_there(row)
    if should is None:
        assert row.library in listed.ELSEWHERE, f"{row.library} is not installed"
    for name in row.names:
        if should:
            listed.resolve(name)
        else:
            with pytest.raises(LookupError):
                listed.resolve(name)


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"tests/[\w/.]+::\w+", listed.LIST.read_text()))
    assert named >= {test for row in ROWS for test in row.tests}
    assert [test for test in sorted(named) if not listed.is_test(test)] == []


def test_what_is_replaced_in_a_module_is_still_looked_up_there():
    there = {name for row in ROWS if listed.is_there(row) for name in row.names}
    names = [n for n in lookups.replaced(scan.uses()) if n in there]
    assert len(names) > 20
    seen = {n for n in names for text in lookups.texts(n) if lookups.is_looked_up(n, text)}
    assert set(names) - seen == set()
