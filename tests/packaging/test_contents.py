"""Contents of sdist and wheel: every file that is needed, and the metadata."""

import re
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import PurePosixPath

import pytest

import kvshift_megatron
from tests.packaging.builds import tracked_files
from tests.project.test_own_imports import imports
from tests.support.launch import PROJECT

pytestmark = pytest.mark.slow

# Imported module -> distribution to install. Apex has none: users build it.
DISTRIBUTIONS = {
    "matplotlib": "matplotlib",
    "megatron": "megatron-core",
    "mlx": "mlx",
    "mlx_lm": "mlx-lm",
    "numpy": "numpy",
    "packaging": "packaging",
    "pynvml": "nvidia-ml-py",
    "sentencepiece": "sentencepiece",
    "tensorboard": "tensorboard",
    "torch": "torch",
    "transformers": "transformers",
    "triton": "triton",
}
NOT_DISTRIBUTED = {"apex"}


@pytest.fixture(scope="session")
def wheel(built) -> dict[str, bytes]:
    """Return the contents of every file in the wheel, by name."""
    with zipfile.ZipFile(built[1]) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="session")
def sdist(built) -> dict[str, bytes]:
    """Return the same of the sdist, with names without its top folder."""
    with tarfile.open(built[0]) as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        return {f.name.partition("/")[2]: archive.extractfile(f).read() for f in files}


@pytest.fixture(scope="session")
def metadata(wheel):
    (name,) = [name for name in wheel if name.endswith(".dist-info/METADATA")]
    return message_from_bytes(wheel[name])


def lacking(files: dict[str, bytes], names: list[str]) -> list[str]:
    """Return the repository's files that an archive lacks or has with other contents."""
    return [n for n in names if n not in files or files[n] != (PROJECT / n).read_bytes()]


def in_repository() -> list[str]:
    """Return the repository's files, except links and hidden ones (settings of git, CI, ...)."""
    names = [name for name in tracked_files() if not name.startswith(".")]
    return [name for name in names if not (PROJECT / name).is_symlink()]


def test_the_sdist_has_the_whole_repository(sdist):
    assert not lacking(sdist, in_repository())
    assert lacking(dict(sdist, **{"Makefile": b""}), ["Makefile", "README.md"]) == ["Makefile"]
    assert lacking({}, ["README.md"]) == ["README.md"]


def test_the_wheel_has_every_module_and_nothing_from_outside_the_package(wheel):
    modules = [n for n in in_repository() if n.startswith("kvshift_megatron/") and n[-3:] == ".py"]
    assert len(modules) > 150 and not lacking(wheel, modules)
    top = {PurePosixPath(name).parts[0] for name in wheel}
    assert top == {"kvshift_megatron", f"kvshift_megatron-{kvshift_megatron.__version__}.dist-info"}
    assert {name for name in wheel if name.endswith(".py")} == set(modules)


def test_the_wheel_has_what_its_modules_read(wheel):
    package = PROJECT / "kvshift_megatron"
    expected = {"kvshift_megatron/py.typed"}
    expected |= {
        f"kvshift_megatron/ops/cpu/{path.name}" for path in (package / "ops/cpu").glob("*.c")
    }
    for folder in ("models", "layouts"):
        found = (package / "recipes" / folder).glob("*.toml")
        expected |= {f"kvshift_megatron/recipes/{folder}/{path.name}" for path in found}
    for path in (PROJECT / "patches").glob("*/*"):
        relative = path.relative_to(PROJECT)
        name = f"kvshift_megatron/megatron_lm/{relative}"
        assert wheel[name] == path.read_bytes()
        expected.add(name)
    data = {name for name in wheel if name.startswith("kvshift_megatron/") and name[-3:] != ".py"}
    assert data == expected


def not_in_wheel(wheel: dict[str, bytes]) -> list[str]:
    """Return modules of the package that the wheel lacks although a module in it imports them."""
    found = set()
    for name, text in wheel.items():
        if not name.endswith(".py"):
            continue
        for module, _ in imports(text.decode()):
            path = module.replace(".", "/")
            if module.partition(".")[0] == "kvshift_megatron" and not (
                {f"{path}.py", f"{path}/__init__.py"} & wheel.keys()
            ):
                found.add(module)
    return sorted(found)


def test_the_wheel_has_what_its_modules_import(wheel):
    assert not_in_wheel(wheel) == []
    without = {name: text for name, text in wheel.items() if "/recipes/" not in name}
    assert "kvshift_megatron.recipes" in not_in_wheel(without)


def required(metadata) -> set[str]:
    """Return the names of all dependencies, including those of extras."""
    return {re.match(r"[\w.-]+", line)[0] for line in metadata.get_all("Requires-Dist")}


def test_what_is_imported_is_declared(wheel, metadata):
    ours = {"kvshift_megatron"} | sys.stdlib_module_names
    third = {
        module.partition(".")[0]
        for name, text in wheel.items()
        if name.endswith(".py")
        for module, _ in imports(text.decode())
    } - ours
    assert third - NOT_DISTRIBUTED == DISTRIBUTIONS.keys()
    assert not set(DISTRIBUTIONS.values()) - required(metadata)


def test_extras_are_what_users_ask_for(metadata):
    assert {"hf", "watch", "plots", "te", "triton"} <= set(metadata.get_all("Provides-Extra"))


def test_the_version_is_in_one_place_and_has_a_section_in_the_changelog(metadata):
    version = kvshift_megatron.__version__
    assert metadata["Version"] == version
    pyproject = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert "version" not in pyproject["project"]
    newest = re.search(r"^## (\S+)", (PROJECT / "CHANGELOG.md").read_text(), re.M)[1]
    assert newest == version


def test_links_of_the_project_are_addresses(metadata):
    links = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert links["Paper"] == "https://arxiv.org/abs/2411.19574"
    assert all(address.startswith("https://") for address in links.values())
