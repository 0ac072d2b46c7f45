"""An output that is, contains or lies inside an input is refused, however the path is spelled."""

import os
from pathlib import Path

import pytest

from kvshift_megatron.utils import output_paths
from kvshift_megatron.utils.output_paths import check_distinct, check_outputs


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Make a model, a link to it, and a snapshot of links, as in Hugging Face's cache."""
    monkeypatch.chdir(tmp_path)
    for folder in ("store/model/sub", "other", "cache/snapshot", "cache/blobs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "store/model/shard").write_text("weights")
    (tmp_path / "cache/blobs/abc").write_text("weights")
    os.link(tmp_path / "store/model/shard", tmp_path / "other/hard")
    (tmp_path / "other/free").write_text("old")
    (tmp_path / "cache/snapshot/shard").symlink_to("../blobs/abc")
    (tmp_path / "cache/snapshot/more").symlink_to(tmp_path / "store/model")
    (tmp_path / "cache/snapshot/itself").symlink_to("../snapshot")
    (tmp_path / "link").symlink_to("store/model")
    (tmp_path / "twice").symlink_to("link")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "other/up").symlink_to("..")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "source", "relation"),
    [
        ("store/model", "store/model", "is"),
        ("store/model/shard", "store/model", "lies inside"),
        ("store/model/new/deep", "store/model", "lies inside"),
        ("store", "store/model", "contains"),
        (".", "store/model", "contains"),
        ("/", "store/model", "contains"),
        ("", "store/model", "contains"),
        ("other/../store/model", "store/model", "is"),
        ("other/up/store/model", "store/model", "is"),
        ("store/model/sub/..", "store/model", "is"),
        ("store/model/", "store/model", "is"),
        ("link", "store/model", "is"),
        ("twice/new", "store/model", "lies inside"),
        ("store/model", "twice", "is"),
        ("link", "twice", "is"),
        ("store", "link", "contains"),
        (".", "cache/snapshot", "contains"),
        ("other/hard", "store/model", "shares a file with"),
        ("other/hard", "store/model/shard", "is"),
        ("cache/blobs/abc", "cache/snapshot", "is"),
        ("cache/blobs", "cache/snapshot", "contains"),
        ("store/model/sub/new", "cache/snapshot", "lies inside"),
        ("other/hard", "cache/snapshot", "shares a file with"),
    ],
)
def test_refused(place, output, source, relation):
    for path in (Path(output), Path(os.path.relpath(place / output)), place / output):
        with pytest.raises(ValueError, match=f"because it {relation} the input .*: choose another"):
            check_outputs([path], [Path("other/free"), Path(source)])


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("store/model2", "store/model"),
        ("store/mode", "store/model"),
        ("new", "link"),
        ("new", "missing"),
        ("missing", "missing"),
        ("other/free", "store/model"),
        ("cache/new", "cache/snapshot"),
        ("loop", "store/model"),
        ("new", "loop"),
    ],
)
def test_allowed(place, output, source):
    check_outputs([Path(output), place / output], [Path(source), place / source])


def test_a_file_system_that_ignores_case(place, monkeypatch):
    stat = os.stat

    def ignoring_case(path, **options):
        return stat(Path(str(path).replace("STORE", "store").replace("Model", "model")), **options)

    check_outputs([Path("STORE/Model")], [Path("store/model")])
    monkeypatch.setattr(output_paths.os, "stat", ignoring_case)
    relations = {"STORE/Model": "is", "STORE": "contains", "STORE/Model/x": "lies inside"}
    for output, relation in relations.items():
        with pytest.raises(ValueError, match=relation):
            check_outputs([Path(output)], [Path("store/model")])


def test_two_outputs_are_never_the_same_file(place):
    check_distinct([Path("a"), Path("b"), Path("store/a")])
    for pair in (("a", "A"), ("a", "store/../a"), ("store/model/shard", "other/hard")):
        with pytest.raises(ValueError, match="are the same file: give each output its own"):
            check_distinct(map(Path, pair))
