"""One launch per world size, whose results all tests share."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.launch import ranks
from tests.support.releases import imported_from

_TIMEOUT = 600  # seconds for one launch; the largest takes under 100 on two cores


class Results:
    """The results of each world size's cases, launched when first asked for."""

    def __init__(self, directory):
        self._directory = directory
        self._launched = {}

    def __call__(self, world_size: int, name: str) -> dict:
        """Return the result of a case or property; raise its failure as an AssertionError."""
        output = self._directory / f"world-{world_size}"
        if world_size not in self._launched:
            output.mkdir()
            self._launched[world_size] = ranks(
                world_size, "tests.distributed.worker", [str(output)], _TIMEOUT
            )
            self._check_release(world_size, output)
        launch = self._launched[world_size]
        path = output / f"{name}.pt"
        assert path.exists(), f"{name} gave nothing; the launch said:\n{launch.stdout[-5000:]}"
        outcome = torch.load(path)
        assert "error" not in outcome, f"{name}: {outcome['error']}"
        return outcome["result"]

    def _check_release(self, world_size: int, output: Path) -> None:
        """Check that the ranks have run the Megatron that this process imports."""
        left = [output / f"megatron-{rank}.json" for rank in range(world_size)]
        said = self._launched[world_size].stdout[-5000:]
        assert all(path.exists() for path in left), f"not every rank started:\n{said}"
        for path in left:
            assert json.loads(path.read_text()) == imported_from(), path.stem


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Results:
    return Results(tmp_path_factory.mktemp("distributed"))
