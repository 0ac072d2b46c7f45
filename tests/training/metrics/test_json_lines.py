"""Lines survive truncation, resumes and full disks, and hold numbers that JSON lacks."""

import json
import math
import os

import pytest

from kvshift_megatron.training.metrics import json_lines
from kvshift_megatron.training.metrics.json_lines import JsonLines, read_lines, read_metrics


def test_lines_are_strict_json_and_come_back(tmp_path):
    path = tmp_path / "new" / "folder" / "metrics.jsonl"
    lines = JsonLines(path)
    values = {"loss": 1 / 3, "nan": math.nan, "up": math.inf, "down": -math.inf, "text": "a:0"}
    lines.append({"iteration": 1, **values, "list": [1, math.nan]})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    back = read_metrics(path)[1]
    assert back["loss"].hex() == (1 / 3).hex()
    assert math.isnan(back["nan"]) and back["up"] == math.inf and back["down"] == -math.inf
    assert back["text"] == "a:0"


def test_a_truncated_line_loses_only_itself(tmp_path):
    """Truncate after every byte of the last line: the resumed run's lines are whole."""
    first, last = {"iteration": 1, "lm loss": 2.5}, {"iteration": 2, "lm loss": 1.25, "é": "ü"}
    lines = JsonLines(tmp_path / "whole.jsonl")
    lines.append(first)
    lines.append(last)
    whole = lines.path.read_bytes()
    begin = whole.index(b"\n") + 1
    resumed = {"iteration": 2, "lm loss": 1.5}
    for end in range(begin, len(whole) + 1):
        path = tmp_path / f"torn-{end}.jsonl"
        path.write_bytes(whole[:end])
        JsonLines(path).append(resumed)
        found = list(read_lines(path))
        # A line that lacks only its newline is complete.
        complete = [last] if end >= len(whole) - 1 else []
        assert found == [first, *complete, resumed], end
        assert read_metrics(path)[2]["lm loss"] == 1.5


def test_a_plain_append_after_a_truncated_line_loses_both(tmp_path):
    """What the test above guards against: an append that does not look at the end of the file."""
    path = tmp_path / "torn.jsonl"
    path.write_text('{"iteration": 1}\n{"iterat')
    with path.open("a") as file:
        file.write('{"iteration": 2}\n')
    assert list(read_lines(path)) == [{"iteration": 1}]


def test_the_last_value_of_an_iteration_counts(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for iteration, value in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5), (4, 2.5)):
        lines.append({"iteration": iteration, "lm loss": value, f"only in {value}": 1})
    lines.append({"iteration": 4, "lm loss validation": 9.0})
    metrics = read_metrics(lines.path)
    assert [values["lm loss"] for values in metrics.values()] == [5.0, 4.5, 3.5, 2.5]
    assert list(metrics) == [1, 2, 3, 4]
    assert metrics[2]["only in 4.0"] == 1
    assert metrics[4]["lm loss validation"] == 9.0


def test_a_full_disk_is_one_warning():
    """/dev/full fails every write as a full disk does."""
    warnings = []
    lines = JsonLines("/dev/full", warnings.append)
    for iteration in range(5):
        lines.append({"iteration": iteration})
    assert len(warnings) == 1
    assert "/dev/full cannot be written ([Errno 28] No space left on device)" in warnings[0]
    assert lines.lost == 5


def test_a_disk_that_was_full_is_written_again(tmp_path, monkeypatch):
    """Only half a line was written while it was full."""
    warnings = []
    lines = JsonLines(tmp_path / "metrics.jsonl", warnings.append)
    lines.append({"iteration": 1})
    write = os.write
    monkeypatch.setattr(json_lines.os, "write", lambda file, data: write(file, data[:7]))
    lines.append({"iteration": 2})
    monkeypatch.undo()
    lines.append({"iteration": 3})
    assert list(read_lines(lines.path)) == [{"iteration": 1}, {"iteration": 3}]
    assert len(warnings) == 1 and "only 7 of 17 bytes" in warnings[0]


@pytest.mark.parametrize("in_the_way", ["a folder of its name", "a file for its folder"])
def test_a_place_that_cannot_be_written_is_one_warning(tmp_path, in_the_way):
    path = tmp_path / "folder" / "metrics.jsonl"
    if in_the_way == "a folder of its name":
        path.mkdir(parents=True)
    else:
        path.parent.write_text("")
    warnings = []
    lines = JsonLines(path, warnings.append)
    lines.append({"iteration": 1})
    lines.append({"iteration": 2})
    assert len(warnings) == 1 and "cannot be written" in warnings[0]


def test_two_writers_of_one_file_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "shared.jsonl"
    first, second = JsonLines(path), JsonLines(path)
    for number in range(50):
        first.append({"iteration": number, "from": "first"})
        second.append({"iteration": number, "from": "second"})
    assert len(list(read_lines(path))) == 100
