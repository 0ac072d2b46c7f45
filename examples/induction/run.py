"""Train the three models of the paper's Figure 1a and check the claims about them.

    python examples/induction/run.py [--config demo|paper_fig1a|FILE.toml]
                                     [--output DIR] [--steps N]

Every model runs through `torchrun ... -m kvshift_megatron.pretrain`; see configs/ for the flags.
Exit status: 0 if the claims hold, 1 if one fails or a run fails, 2 for a mistake in the arguments,
130 after Ctrl-C.
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a file: make `examples` importable

from examples.induction import config as configuration  # noqa: E402 (needs the path above)
from examples.induction import launch, report  # noqa: E402
from examples.induction.logs import Evaluation  # noqa: E402
from kvshift_megatron.utils.output_paths import check_outputs  # noqa: E402


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", default="demo", help="a name in configs/ or a TOML file (default: demo)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "output",
        help="directory for logs, results.json and induction.png",
    )
    parser.add_argument("--steps", type=int, help="training steps, instead of the configuration's")
    return parser.parse_args(argv)


def prepare_output(output: Path) -> None:
    """Make the directory.

    Raises:
        ValueError: The path is not a directory, or cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output}: {error.strerror}") from error


def written(config: configuration.Config, output: Path) -> list[Path]:
    """Return the files that `run` writes."""
    logs = [launch.log_file(output, model) for model in config.models]
    return [output / "results.json", output / "induction.png", *logs]


def run(config: configuration.Config, output: Path) -> int:
    """Train, check and report; earlier results in `output` stay until all new ones are complete."""
    width = max(len(model.name) for model in config.models)

    def progress(name: str, evaluation: Evaluation, seconds: float) -> None:
        print(
            f"{name:<{width}}  step {evaluation.step:>4}/{config.steps}  "
            f"loss {evaluation.loss:.3f}  induction accuracy {evaluation.accuracy:.3f}  "
            f"[{seconds:.0f} s]",
            flush=True,
        )

    names = ", ".join(model.name for model in config.models)
    print(f"{config.name}: {config.steps} steps each of {names}; logs in {output}", flush=True)
    start = time.monotonic()
    results = launch.run_all(config, output, progress)
    seconds = time.monotonic() - start
    verdicts = report.judge_all(config, results)
    report.write_figure(output / "induction.png", config, results)
    report.write_json(output / "results.json", config, results, verdicts, seconds)

    print(f"\n{report.table(results)}\n")
    for verdict in verdicts:
        print(verdict.sentence)
    print(f"{seconds:.0f} s in all; {output / 'results.json'}, {output / 'induction.png'}")
    return 1 if any(verdict.holds is False for verdict in verdicts) else 0


def _interrupt_once(number: int, frame: object) -> NoReturn:
    """Turn the first SIGINT or SIGTERM into KeyboardInterrupt, and ignore later ones.

    A later one must not interrupt the stopping of the children.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = parse_arguments(argv)
    try:
        config = configuration.load(arguments.config, arguments.steps)
        check_outputs(written(config, arguments.output), [configuration.file_of(arguments.config)])
        prepare_output(arguments.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return run(config, arguments.output)
    except launch.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; all runs stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _interrupt_once)
    signal.signal(signal.SIGTERM, _interrupt_once)
    sys.exit(main())
