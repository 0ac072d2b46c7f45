"""Names in a checkpoint folder, against Megatron's own."""

import pytest
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename

from kvshift_megatron.checks.checkpoint_paths import (
    RELEASE,
    TRACKER,
    iteration_folder,
    read_tracker,
    stored_iterations,
)


def test_names_are_megatrons(tmp_path):
    assert str(tmp_path / TRACKER) == get_checkpoint_tracker_filename(str(tmp_path))
    for iteration in (7, 12_345_678):
        expected = get_checkpoint_name(str(tmp_path), iteration, return_base_dir=True)
        assert str(iteration_folder(tmp_path, iteration)) == expected
        assert str(iteration_folder(tmp_path, str(iteration))) == expected
    expected = get_checkpoint_name(str(tmp_path), 0, release=True, return_base_dir=True)
    assert str(iteration_folder(tmp_path, RELEASE)) == expected


def test_other_names_of_iterations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="newest"):
        iteration_folder(tmp_path, "newest")


def test_folders_are_listed_by_iteration(tmp_path):
    for name in ("iter_0000020", "iter_0000003", "iter_10000000", "iter_4", "release", "iter_x"):
        (tmp_path / name).mkdir()
    assert stored_iterations(tmp_path) == [3, 20, 10_000_000]


def test_a_tracker_is_read_without_its_newline(tmp_path):
    assert read_tracker(tmp_path) is None
    (tmp_path / TRACKER).write_text("20\n")
    assert read_tracker(tmp_path) == "20"
