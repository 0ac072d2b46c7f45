"""Which tests run on which release of megatron-core (`make test-matrix`): all but those here.

On a checkout of Megatron-LM (`make test-next`) some of them run too.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path

# Beginning of a test's id -> why the matrix leaves it out on every release.
NOT_IN_MATRIX = {
    "tests/integration/": "this project's entry point, which needs 0.19 (`make test`)",
    "tests/training/metrics/": "this project's entry point, likewise",
    "tests/training/faults/": "this project's entry point, likewise",
    "tests/training/test_flag_ranges.py": "this project's entry point, likewise",
    "tests/planning/": "this project's entry point, likewise",
    "tests/benchmarks/": "this project's entry point, likewise",
    "tests/transformer_engine/": "`make test-te`, in an environment of its own",
    "tests/packaging/": "sdist and wheel, with 0.19 (`make test`)",
    "tests/gpu/": "`make test-gpu`, on a GPU",
    "tests/slurm/": "`make test-slurm`, as root",
    "tests/examples/": "the demo, which trains through the entry point",
    "tests/recipes/": "flags of the entry point",
    "tests/megatron_lm/test_check.py": "a tool for checkouts of Megatron-LM",
    "tests/ops/": "the operation alone",
    "tests/project/test_commands.py": "commands without Megatron",
    "tests/project/private_names/test_planted_errors.py": "this project's text",
    "tests/project/test_releases.py": "this project's tests",
    "tests/project/test_own_imports.py": "this project's text",
    "tests/project/test_docs.py": "this project's text",
    "tests/project/test_ci_files.py": "this project's text",
    "tests/project/test_layout.py": "this project's text",
    "tests/project/test_requirements.py": "the versions of the environment",
    "tests/project/test_cpu_build.py": "the versions of the environment",
    "tests/distributed/test_lost_rank.py": "torch.distributed alone",
    "tests/distributed/test_rank_server.py": "torch.distributed alone",
    "tests/distributed/test_resharding.py": "0.19's checkpoints (`make test`)",
    "tests/convert/": "the converter, which reads and writes 0.19's checkpoints (`make test`)",
    "tests/hf/": "Transformers alone",
    "tests/utils/test_output_paths.py": "paths alone",
    "tests/checks/test_pickles.py": "pickles alone",
}

# Beginnings of ids of tests that `make test-next` runs though the matrix leaves them out.
ALSO_NEXT = (
    "tests/integration/test_training_loop.py",
    "tests/integration/test_model_kinds_loop.py",
    "tests/integration/test_hybrid_loop.py",
    "tests/integration/test_checkpoints.py",
)

# Beginning of a test's id -> (first release with what it tests, what that is).
BEGINS_IN = {
    "tests/upstream/test_probe.py::test_every_overridden_method_of_the_builders": (
        "0.19",
        "GPTModelBuilder",
    ),
    "tests/upstream/test_probe.py::test_the_entry_point_refuses": ("0.19", "the entry point"),
    "tests/test_layer_specs.py::test_local_parts[gpt-": ("0.19", "GPTModelConfig"),
    "tests/test_layer_specs.py::test_an_impossible_model_is_refused": (
        "0.19",
        "GPTModelConfig",
    ),
    "tests/checks/test_model.py::test_the_spec_callable_hooks": ("0.19", "GPTModelConfig"),
    "tests/checks/test_integrity.py::test_the_file_is_megatrons": ("0.19", "hashes"),
    "tests/checks/test_stored_settings.py::test_a_checkpoint_that_cannot_be_read_is_named": (
        "0.19",
        "arguments that are read through .metadata",
    ),
    "tests/checks/test_compare_forms.py::test_translated_": (
        "0.19",
        "loads of GPT checkpoints into hybrid models",
    ),
    "tests/cpu/test_flags.py::test_table_names_flags_of_the_installed_megatron": (
        "0.19",
        "some of the flags that a CPU refuses",
    ),
    "tests/cpu/test_layer.py::test_a_gated_delta_net": ("0.19", "a package of it"),
    "tests/checks/test_never_silently.py::test_megatrons_builder_": ("0.19", "GPTModelBuilder"),
    "tests/checks/test_never_silently.py::test_this_packages_builder_": ("0.19", "GPTModelBuilder"),
    "tests/checks/test_never_silently.py::test_megatron_still_ignores": (
        "0.18",
        "hybrid_config_from_args",
    ),
}


def checkout(wanted: str) -> Path | None:
    """Return the folder that `--megatron` names, or None if it names a version."""
    return Path(wanted).resolve() if os.sep in wanted else None


def why_not_in_matrix(test_id: str, next_one: bool = False) -> str | None:
    if next_one and test_id.startswith(ALSO_NEXT):
        return None
    return next((why for start, why in NOT_IN_MATRIX.items() if test_id.startswith(start)), None)


def why_not_in_release(test_id: str, version: str) -> str | None:
    for start, (first, what) in BEGINS_IN.items():
        if test_id.startswith(start) and _series(version) < _series(first):
            return f"begins in megatron-core {first}: {what}"
    return None


def imported_version() -> str:
    """Return the release of megatron-core that this process imports, without "+COMMIT"."""
    from megatron.core import package_info

    return package_info.__version__.partition("+")[0]


def failed_import_stops() -> bool:
    """Return whether Megatron raises an ImportError of the module in --spec, as from 0.20 on."""
    return _series(imported_version()) >= (0, 20)


def imported_from() -> list[str]:
    """Return the paths of megatron.core and megatron.training, which a release has side by side."""
    # Looked up, not imported: megatron.training takes seconds.
    return [find_spec(f"megatron.{part}").origin for part in ("core", "training")]


def _series(version: str) -> tuple[int, ...]:
    """Return (0, 19) for 0.19.2."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
