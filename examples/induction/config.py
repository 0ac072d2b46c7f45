"""Configurations of the experiment: Megatron flags in TOML, one table per model.

[run]            max_processes: how many ranks may run at a time; cpu: train on the CPU even if
                 there is a GPU (default false)
[common]         Megatron flags of every model, written without the dashes
[models.NAME]    nproc, and the flags of this model (they override [common])
[[claims]]       model, and either at_least + by_step or never_above
"""

import re
from dataclasses import dataclass
from pathlib import Path

from kvshift_megatron.recipes import toml_flags as megatron_flags
from kvshift_megatron.recipes.toml_flags import Flags

CONFIG_DIR = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Model:
    """One model of the experiment: its name, number of processes and Megatron flags."""

    name: str
    nproc: int
    flags: Flags

    @property
    def parallelism(self) -> str:
        """The parallelism for the table, such as "TP 2, SP" or "TP 1"."""
        sequence_parallel = ", SP" if self.flags.get("sequence-parallel") else ""
        return f"TP {self.flags.get('tensor-model-parallel-size', 1)}{sequence_parallel}"

    def argv(self) -> list[str]:
        """Return the flags as a command line."""
        return megatron_flags.command_line(self.flags)


@dataclass(frozen=True)
class Claim:
    """What the accuracy of one model must show."""

    model: str
    at_least: float | None = None
    by_step: int | None = None
    never_above: float | None = None

    def __str__(self) -> str:
        if self.never_above is not None:
            return f"{self.model}: never above {self.never_above}"
        return f"{self.model}: at least {self.at_least} by step {self.by_step}"


@dataclass(frozen=True)
class Config:
    """A whole experiment. `raw` is the parsed TOML, for the record."""

    name: str
    max_processes: int
    cpu: bool
    models: tuple[Model, ...]
    claims: tuple[Claim, ...]
    raw: dict

    @property
    def steps(self) -> int:
        """Training iterations of each model."""
        return self.models[0].flags["train-iters"]

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the data is drawn from."""
        return self.models[0].flags["vocab-size"]


def file_of(name: str) -> Path:
    """Return the file of a configuration, given by its name in configs/ or by its path.

    Raises:
        ValueError: There is no such file.
    """
    return megatron_flags.find(name, CONFIG_DIR, "--config")


def load(name: str, steps: int | None = None) -> Config:
    """Read and check a configuration.

    Args:
        name: A name in configs/, or a path.
        steps: Replaces train-iters if given.

    Raises:
        ValueError: A field is missing, unknown or wrong; the message names it and the file.
    """
    path = file_of(name)
    raw = megatron_flags.read(path)
    if steps is not None:
        if steps < 1:
            raise ValueError(f"--steps must be at least 1, got {steps}")
        raw.setdefault("common", {})["train-iters"] = steps
    try:
        return _parse(path.stem, raw)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _parse(name: str, raw: dict) -> Config:
    unknown = set(raw) - {"run", "common", "models", "claims"}
    if unknown:
        raise ValueError(
            f"unknown sections: {', '.join(sorted(unknown))}: expected run, common, models, claims"
        )
    if not raw.get("models"):
        raise ValueError("models: at least one [models.NAME] is required")
    common = raw.get("common", {})
    models = tuple(_model(key, common | table) for key, table in raw["models"].items())
    for field in ("train-iters", "vocab-size"):
        values = {model.flags.get(field) for model in models}
        if len(values) != 1 or not isinstance(values.copy().pop(), int):
            raise ValueError(f"{field} must be one integer, the same for all models")
    run = {"max_processes": 1, "cpu": False} | raw.get("run", {})
    if set(run) != {"max_processes", "cpu"} or not isinstance(run["cpu"], bool):
        raise ValueError("run: expected only max_processes (an integer) and cpu (true or false)")
    max_processes = run["max_processes"]
    largest = max(model.nproc for model in models)
    if not isinstance(max_processes, int) or max_processes < largest:
        raise ValueError(f"run.max_processes must be at least the largest nproc, {largest}")
    claims = tuple(
        _claim(table, {model.name for model in models}) for table in raw.get("claims", [])
    )
    return Config(name, max_processes, run["cpu"], models, claims, raw)


def _model(name: str, table: Flags) -> Model:
    if not re.fullmatch(r"[\w.-]+", name):  # a log file gets this name
        raise ValueError(f"models.{name}: use only letters, digits, '.', '_' and '-' in the name")
    flags = dict(table)
    nproc = flags.pop("nproc", 1)
    if not isinstance(nproc, int) or nproc < 1:
        raise ValueError(f"models.{name}.nproc must be a positive integer, got {nproc!r}")
    return Model(name, nproc, flags)


def _claim(table: dict, models: set[str]) -> Claim:
    if table.get("model") not in models:
        raise ValueError(f"claims: model {table.get('model')!r} is not in [models]")
    if set(table) not in ({"model", "at_least", "by_step"}, {"model", "never_above"}):
        raise ValueError(f"claims: {table['model']} needs at_least and by_step, or never_above")
    return Claim(**table)
