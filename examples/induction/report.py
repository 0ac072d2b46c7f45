"""Report the experiment: claims, table, JSON file and figure."""

import importlib.metadata
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from examples.induction.config import Claim, Config
from examples.induction.launch import Result
from examples.induction.logs import Evaluation
from kvshift_megatron.utils.atomic_files import replace

_TABLE_STEPS = (100, 200, 300, 400)
# Okabe and Ito's colours, which colour-blind readers can distinguish; the lines differ too.
STYLES = {
    "kv-shift-1-layer": ("#D55E00", "-"),
    "vanilla-1-layer": ("#0072B2", "--"),
    "vanilla-2-layers": ("#009E73", "-."),
}


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds; None if the run was too short to tell."""

    claim: Claim
    holds: bool | None
    sentence: str


def judge(claim: Claim, evaluations: list[Evaluation]) -> Verdict:
    """Check one claim against the validation points of its model.

    "at least A by step S" is checked at the last validation up to S: a model that reached A earlier
    and lost it again fails.
    """
    if claim.never_above is not None:
        best = max(evaluations, key=lambda e: math.inf if math.isnan(e.accuracy) else e.accuracy)
        holds = best.accuracy <= claim.never_above  # False for NaN
        word = "holds" if holds else "FAILS"
        return Verdict(
            claim, holds, f"{claim}: {word}, highest {best.accuracy:.3f} at step {best.step}"
        )
    reached = [e for e in evaluations if e.step <= claim.by_step]
    if not reached or evaluations[-1].step < claim.by_step:
        end = evaluations[-1].step
        return Verdict(claim, None, f"{claim}: not checked, the run ended at step {end}")
    last = reached[-1]
    holds = last.accuracy >= claim.at_least
    word = "holds" if holds else "FAILS"
    return Verdict(claim, holds, f"{claim}: {word}, {last.accuracy:.3f} at step {last.step}")


def judge_all(config: Config, results: list[Result]) -> list[Verdict]:
    """Check the configuration's claims."""
    evaluations = {result.model.name: result.log.evaluations for result in results}
    return [judge(claim, evaluations[claim.model]) for claim in config.claims]


def table(results: list[Result]) -> str:
    """Return one aligned row per model, with accuracies at fixed steps that were validated."""
    head = ["model", "parameters/rank", "parallelism", "final loss"]
    head += [f"step {step}" for step in _TABLE_STEPS] + ["final", "seconds"]
    rows = [head]
    for result in results:
        log = result.log
        at = {e.step: f"{e.accuracy:.3f}" for e in log.evaluations}
        parameters = f"{log.parameters_per_rank:,}" if log.parameters_per_rank else "-"
        last = log.evaluations[-1]
        row = [result.model.name, parameters, result.model.parallelism, f"{last.loss:.3f}"]
        row += [at.get(step, "-") for step in _TABLE_STEPS]
        rows.append([*row, f"{last.accuracy:.3f}", f"{result.seconds:.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in (0, 2) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return None


def _versions() -> dict[str, str | None]:
    import kvshift_megatron

    own = getattr(kvshift_megatron, "__version__", None)
    others = {name: _version(name) for name in ("torch", "megatron-core", "numpy", "matplotlib")}
    return {"kvshift_megatron": own} | others


def _json_ready(value: object) -> object:
    """Replace NaN and infinity, which strict JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _json_ready(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(
    path: Path, config: Config, results: list[Result], verdicts: list[Verdict], seconds: float
) -> None:
    """Write every validation point, with what is needed to repeat the run.

    Args:
        path: Target, replaced atomically.
        config: The experiment as read, with --steps applied.
        results: One per model.
        verdicts: One per claim.
        seconds: Wall time of the whole experiment.
    """
    content = {
        "config_name": config.name,
        "config": config.raw,
        "versions": _versions(),
        "seconds": round(seconds, 1),
        "models": {
            result.model.name: {
                "parallelism": result.model.parallelism,
                "parameters_per_rank": result.log.parameters_per_rank,
                "seconds": round(result.seconds, 1),
                "evaluations": [asdict(e) for e in result.log.evaluations],
                "test": asdict(result.log.test) if result.log.test else None,
            }
            for result in results
        },
        "claims": [
            {"claim": str(v.claim), "holds": v.holds, "sentence": v.sentence} for v in verdicts
        ],
    }
    text = json.dumps(_json_ready(content), indent=2, allow_nan=False) + "\n"
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_figure(path: Path, config: Config, results: list[Result]) -> None:
    """Draw accuracy against training step, one curve per model, as a PNG replaced atomically."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        colour, line = STYLES.get(result.model.name, (None, "-"))
        steps = [e.step for e in result.log.evaluations]
        accuracies = [e.accuracy for e in result.log.evaluations]
        label = f"{result.model.name} ({result.model.parallelism})"
        axes.plot(steps, accuracies, line, color=colour, marker="o", markersize=4, label=label)
    chance = 1 / config.vocab_size
    axes.axhline(chance, color="0.5", linestyle=":", label=f"chance (1/{config.vocab_size})")
    axes.set(xlabel="training step", ylabel="accuracy at the first repeat", ylim=(-0.03, 1.03))
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(f"Induction: one KV-shifting layer against vanilla attention ({config.name})")
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", fontsize=9)
    replace(path, lambda temporary: figure.savefig(temporary, format="png"))
