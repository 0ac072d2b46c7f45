"""All cases, planned and run, once per session."""

import json
from pathlib import Path

import pytest

from tests.planning.cases import CASES
from tests.support.launch import ranks

_TIMEOUT = 600  # seconds for one launch; the longest takes about 70 alone on two cores


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> dict[str, list[dict]]:
    """Return case -> what the first and the last rank of its real run left; see real_run.py."""
    folder = tmp_path_factory.mktemp("real")
    cases = folder / "cases.json"
    cases.write_text(
        json.dumps({n: {"ranks": c.ranks, "command": c.command} for n, c in CASES.items()})
    )
    most = max(case.ranks for case in CASES.values())
    # The compiled shift does not pass torch's dispatcher, where FLOPs are counted.
    plain = {"KVSHIFT_IMPLEMENTATION": "eager"}
    launch = ranks(most, "tests.planning.real_ranks", [str(cases)], _TIMEOUT, forks=True, **plain)
    return {
        name: [_left(folder / name / f"rank-{rank}.json", launch) for rank in case.planned_ranks]
        for name, case in CASES.items()
    }


def _left(path: Path, launch) -> dict:
    log = path.with_suffix(".log")
    said = log.read_text()[-4000:] if log.exists() else launch.stdout[-4000:]
    assert path.exists(), f"{path.parent.name} left nothing:\n{said}"
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def plan_folder(tmp_path_factory) -> Path:
    """Return the folder that planned_cases.py fills.

    It runs in a process of its own, as a plan turns the CPU layer on for good.
    """
    output = tmp_path_factory.mktemp("planned")
    launch = ranks(1, "tests.planning.planned_cases", [str(output)], _TIMEOUT)
    assert launch.returncode == 0, launch.stdout[-4000:]
    return output


@pytest.fixture(scope="session")
def planned(plan_folder) -> dict[str, list[dict]]:
    """Return case -> what the dry runs of the same ranks counted."""
    return json.loads((plan_folder / "counted.json").read_text())
