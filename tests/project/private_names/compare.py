"""Compare the list with the uses that were found in the text."""

from tests.project.private_names import listed, scan


def unlisted(uses: list[scan.Use], rows: list[listed.Row]) -> list[str]:
    """Return the uses that no row lists."""
    return [
        str(use)
        for use in uses
        if not any(use.file in row.files and any(map(use.is_of, row.names)) for row in rows)
    ]


def unused(uses: list[scan.Use], rows: list[listed.Row], words: dict[str, set[str]]) -> list[str]:
    """Return names and files of the list that are no longer used."""
    found = []
    for row in rows:
        for file in row.files:
            of_file = [use for use in uses if use.file == file]
            found += [
                f"{name} in {file}"
                for name in row.names
                if not any(use.is_of(name) for use in of_file)
                and name.rpartition(".")[2] not in words.get(file, ())
            ]
    return found
