"""A PyTorch built for CPUs installs no CUDA libraries, although the list has their versions.

Resolved by uv and by pip, from a folder of wheels with nothing but metadata.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import uv
from packaging.markers import default_environment

from tests.support import pins

pytestmark = pytest.mark.slow

LIST = pins.LISTS / "dev.txt"
DEV = pins.direct(pins.pyproject(), ["dev"])


def versions() -> dict[str, str]:
    """Return the list's versions for this platform, by name."""
    return {
        name: str(pin.specifier).removeprefix("==")
        for name, lines in pins.read(LIST).items()
        for pin in lines
        if pins.applies(pin, default_environment())
    }


def of_cuda(names) -> set[str]:
    return {name for name in names if name.startswith(("nvidia-", "cuda-"))} - {"nvidia-ml-py"}


def write_wheel(folder: Path, name: str, version: str, requires=()) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    files = {
        "METADATA": "\n".join([*lines, *(f"Requires-Dist: {other}" for other in requires), ""]),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(f"{stem}.dist-info/{file}", text)


def by_uv(needed: Path, folder: Path) -> dict[str, str]:
    run = subprocess.run(
        [uv.find_uv_bin(), "pip", "compile", needed, "--constraint", LIST, "--python",
         sys.executable, "--no-index", "--find-links", folder, "--no-annotate", "--no-header",
         "--no-config", "--no-cache", "--quiet"],
        env={name: text for name, text in os.environ.items() if not name.startswith("UV_")},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return dict(line.split(" ")[0].split("==") for line in run.stdout.splitlines())


def by_pip(needed: Path, folder: Path) -> dict[str, str]:
    run = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--requirement",
         needed, "--constraint", LIST, "--no-index", "--find-links", folder, "--quiet", "--quiet",
         "--report", "-"],
        env={name: text for name, text in os.environ.items() if not name.startswith("PIP_")}
        | {"PIP_CONFIG_FILE": os.devnull},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = (item["metadata"] for item in json.loads(run.stdout)["install"])
    return {item["name"]: item["version"] for item in found}


@pytest.fixture
def needed(tmp_path) -> Path:
    """Write a requirements file with the development environment's requirements."""
    path = tmp_path / "needed.txt"
    path.write_text("".join(f"{requirement}\n" for requirement in DEV))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write a wheel of each version in the list; torch's requires every CUDA library."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    listed = versions()
    for name, version in listed.items():
        write_wheel(folder, name, version, of_cuda(listed) if name == "torch" else ())
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="the list has CUDA for Linux only")
@pytest.mark.parametrize("resolve", [by_uv, by_pip])
def test_only_a_torch_with_cuda_installs_its_libraries(needed, folder, resolve):
    listed = versions()
    found = resolve(needed, folder)
    assert found["torch"] == listed["torch"] and of_cuda(found) == of_cuda(listed) != set()

    write_wheel(folder, "torch", f"{listed['torch']}+cpu")
    found = resolve(needed, folder)
    assert found["torch"] == f"{listed['torch']}+cpu" and not of_cuda(found)
    assert found["numpy"] == listed["numpy"]


def test_nothing_but_torch_requires_cuda():
    class CpuBuild:
        def __init__(self, torch):
            self.version = torch.version
            self.requires = [line for line in torch.requires if "Linux" not in line]

    def installed(name):
        found = pins.in_this_environment(name)
        return CpuBuild(found) if name == "torch" else found

    here = [needed for needed in DEV if pins.applies(needed, default_environment())]
    found, _ = pins.closure(here, installed)
    assert "torch" in found and not of_cuda(found)
