"""One launch per world size, its results shared by every test."""

import pytest
import torch

from tests.distributed.launch import torchrun

_TIMEOUT = 600  # seconds for one launch; the largest takes under 100 on two cores


class Results:
    """What the cases of each world size gave; the launch happens when first asked for."""

    def __init__(self, directory):
        self._directory = directory
        self._launched = {}

    def __call__(self, world_size: int, name: str) -> dict:
        """The result of a case or property; re-raises its failure as an AssertionError."""
        output = self._directory / f"world-{world_size}"
        if world_size not in self._launched:
            output.mkdir()
            self._launched[world_size] = torchrun(
                world_size, ["-m", "tests.distributed.worker", str(output)], _TIMEOUT
            )
        launch = self._launched[world_size]
        path = output / f"{name}.pt"
        assert path.exists(), f"{name} gave nothing; the launch said:\n{launch.stdout[-5000:]}"
        outcome = torch.load(path)
        assert "error" not in outcome, f"{name}: {outcome['error']}"
        return outcome["result"]


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Results:
    return Results(tmp_path_factory.mktemp("distributed"))
