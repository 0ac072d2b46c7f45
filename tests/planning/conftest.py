"""All cases, planned and really run, once a session."""

import json
from pathlib import Path

import pytest

from tests.planning.cases import CASES
from tests.support.launch import ranks

_TIMEOUT = 600  # seconds for one launch; the longest takes about 70 alone on two cores


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> dict[str, list[dict]]:
    """Case -> what the first and the last rank of the real run left; see real_run.py."""
    folder = tmp_path_factory.mktemp("real")
    cases = folder / "cases.json"
    cases.write_text(
        json.dumps({n: {"ranks": c.ranks, "command": c.command} for n, c in CASES.items()})
    )
    most = max(case.ranks for case in CASES.values())
    # The compiled shift would be unseen at torch's dispatcher, where FLOPs are counted.
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
    """What planned_cases.py leaves. In a process of its own, which a plan turns into a CPU's."""
    output = tmp_path_factory.mktemp("planned")
    launch = ranks(1, "tests.planning.planned_cases", [str(output)], _TIMEOUT)
    assert launch.returncode == 0, launch.stdout[-4000:]
    return output


@pytest.fixture(scope="session")
def planned(plan_folder) -> dict[str, list[dict]]:
    """Case -> what the dry runs of the same ranks counted."""
    return json.loads((plan_folder / "counted.json").read_text())
