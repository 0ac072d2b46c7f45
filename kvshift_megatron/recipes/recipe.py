"""Combine a model's file and a layout's file into one set of Megatron flags.

models/NAME.toml   [run] tokens; [flags] the model and its training recipe
layouts/NAME.toml  [run] nproc; [common] flags of all models; [models.NAME] flags of one model

No flag may be in both files: a model says what is trained, a layout only how. The keys of [flags],
[common] and [models.NAME] are Megatron's flags without their dashes.
"""

import argparse
import tomllib
from dataclasses import dataclass
from pathlib import Path

from kvshift_megatron.recipes import toml_flags as megatron_flags
from kvshift_megatron.recipes.hybrid_form import hybrid_form, one_form
from kvshift_megatron.recipes.toml_flags import Flags

HERE = Path(__file__).parent
MODELS = HERE / "models"
LAYOUTS = HERE / "layouts"


@dataclass(frozen=True)
class Run:
    """What is launched.

    Attributes:
        model: Name of the model's file.
        layout: Name of the layout's file.
        nproc: Processes in all, one per GPU.
        flags: Megatron's flags, with overrides applied.
    """

    model: str
    layout: str
    nproc: int
    flags: Flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a run: model, layout, --nproc, --hybrid and --set."""
    parser.add_argument("model", help=_names(MODELS))
    parser.add_argument("layout", help=_names(LAYOUTS))
    parser.add_argument("--nproc", type=int, help="processes in all, instead of the layout's")
    parser.add_argument(
        "--hybrid",
        action="store_true",
        help="the same model as Megatron's HybridModel, with --hybrid-layer-pattern in place of "
        "--num-layers",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FLAG[=VALUE]",
        help="a flag of Megatron or of KV shifting, without its dashes; overrides both files, and "
        "FLAG=false leaves the flag out",
    )


def _names(directory: Path) -> str:
    names = sorted(path.stem for path in directory.glob("*.toml"))
    return f"one of {', '.join(names)}, or a TOML file"


def files(model: str, layout: str) -> tuple[Path, Path]:
    """Return the files of a model and a layout, each given by its name or its path.

    Raises:
        ValueError: There is no such file.
    """
    return (
        megatron_flags.find(model, MODELS, "model"),
        megatron_flags.find(layout, LAYOUTS, "layout"),
    )


def load(
    model: str,
    layout: str,
    overrides: Flags | None = None,
    nproc: int | None = None,
    *,
    hybrid: bool = False,
) -> Run:
    """Read the two files and combine them.

    Args:
        model: A name in models/, or a path.
        layout: A name in layouts/, or a path.
        overrides: Flags that override both files.
        nproc: Replaces the layout's number of processes.
        hybrid: Make a GPT model's flags those of the hybrid model; see hybrid_form.

    Raises:
        ValueError: A file, flag or table is missing, unknown or wrong; the message names it.
    """
    model_path, layout_path = files(model, layout)
    model_tables = megatron_flags.read(model_path)
    layout_tables = megatron_flags.read(layout_path)
    _check_tables(model_path.name, model_tables, {"run", "flags"}, "tokens")
    _check_tables(layout_path.name, layout_tables, {"run", "common", "models"}, "nproc")
    name = model_path.stem
    if name not in layout_tables["models"]:
        known = ", ".join(layout_tables["models"])
        raise ValueError(
            f"{layout_path.name} is for the models {known}, not for {name}: choose another layout, "
            f'or add [models."{name}"]'
        )
    model_flags = model_tables["flags"]
    layout_flags = layout_tables["common"] | layout_tables["models"][name]
    if both := sorted(set(model_flags) & set(layout_flags)):
        raise ValueError(
            f"{layout_path.name} sets {', '.join(both)}, as {model_path.name} does: keep each flag "
            "in one file"
        )
    flags = one_form(model_flags | layout_flags | (overrides or {}), overrides or {})
    if hybrid:
        flags = hybrid_form(flags)
    if "train-iters" not in flags:
        flags["train-iters"] = _steps(model_tables["run"]["tokens"], flags)
    nproc = layout_tables["run"]["nproc"] if nproc is None else nproc
    if nproc < 1:
        raise ValueError(f"--nproc must be at least 1, got {nproc}")
    return Run(name, layout_path.stem, nproc, flags)


def parse_override(text: str) -> tuple[str, object]:
    """Parse --set's argument: FLAG=VALUE with a TOML value or a bare word, or FLAG, a switch.

    Raises:
        ValueError: The text names no flag.
    """
    name, equals, value = text.removeprefix("--").partition("=")
    if not name:
        raise ValueError(f"--set {text}: expected FLAG=VALUE or FLAG")
    if not equals:
        return name, True
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value
    # Numbers keep their spelling.
    return name, parsed if isinstance(parsed, bool | list) else value.strip("\"'")


def _check_tables(file: str, tables: dict, expected: set[str], number: str) -> None:
    if set(tables) != expected or not all(isinstance(table, dict) for table in tables.values()):
        listed = ", ".join(sorted(expected))
        raise ValueError(f"{file}: the tables must be {listed}; found {', '.join(tables)}")
    found = tables["run"]
    if set(found) != {number} or not isinstance(found[number], int) or found[number] < 1:
        raise ValueError(f"{file}: [run] takes {number}, a positive integer")


def _steps(tokens: int, flags: Flags) -> int:
    """Return the steps that read at least `tokens`."""
    sizes = []
    for name in ("global-batch-size", "seq-length"):
        try:
            size = int(flags[name])
        except (KeyError, TypeError, ValueError):
            size = 0
        if size < 1:
            raise ValueError(f"{name} must be a positive integer, got {flags.get(name)!r}")
        sizes.append(size)
    return -(-tokens // (sizes[0] * sizes[1]))
