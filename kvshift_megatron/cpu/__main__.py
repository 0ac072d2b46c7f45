"""Run an unmodified Megatron script on CPUs.

    kvshift-cpu [--nproc-per-node N] SCRIPT ARGS...
    torchrun --nproc-per-node N -m kvshift_megatron.cpu SCRIPT ARGS...

The first form calls torch's own launcher (``torch.distributed.run --standalone``) in this process,
in which nothing is patched. A signal to it ends every rank, and its exit code is that of the rank
that failed first. The second form is what each worker runs: it turns the layer on, even on a
machine with GPUs because this command names the CPU, and runs the script as ``__main__``.
"""

import os
import runpy
import sys
import threading

from kvshift_megatron import cpu
from kvshift_megatron.specs import named_specs

_USAGE = "usage: kvshift-cpu [--nproc-per-node N] SCRIPT ARGS..."
_SECONDS_TO_LEAVE = 10
# Keeps `python -m` from looking for modules in the working directory first.
_SAFE_PATH = "PYTHONSAFEPATH"
_SET_HERE = "kvshift-cpu"


def _fail(sentence: str) -> int:
    # One message is enough; every rank exits with this code.
    if os.environ.get("RANK", "0") == "0":
        print(f"kvshift-cpu: {sentence}", file=sys.stderr, flush=True)
    return 2


def _parse(argv: list[str]) -> tuple[int, str | None, list[str]]:
    """Split the command line into (processes, script, the script's arguments).

    Without argparse: what follows SCRIPT belongs to it, even if it looks like one of our options.
    """
    processes = "1"
    rest = list(argv)
    while rest and rest[0].startswith("-"):
        option, equals, value = rest.pop(0).partition("=")
        if option in ("-h", "--help"):
            return 0, None, []
        if option not in ("--nproc-per-node", "--nproc_per_node"):
            raise ValueError(f"{option} is not an option of this launcher. {_USAGE}")
        processes = value if equals else (rest.pop(0) if rest else "")
    if not processes.isdigit() or int(processes) < 1:
        raise ValueError(f"--nproc-per-node must be a whole number of at least 1: {processes!r}")
    return int(processes), (rest[0] if rest else None), rest[1:]


def _run_worker(script: str, arguments: list[str]) -> None:
    """Run the script in this process as ``python SCRIPT ARGS...`` would."""
    if os.environ.get(_SAFE_PATH) == _SET_HERE:
        del os.environ[_SAFE_PATH]  # what the script starts is its own business
    sys.path[:] = _path_of(script)
    sys.argv = [script, *arguments]
    cpu.enable(force=True)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        _leave_process_group()
        cpu.disable()


def _path_of(script: str) -> list[str]:
    """Return `sys.path` as ``python SCRIPT`` would set it."""
    directory = os.path.dirname(os.path.abspath(script))
    # The first entry is the working directory (-m) or this command's folder, not the script's.
    return [directory, *(sys.path if sys.flags.safe_path else sys.path[1:])]


def _check_spec(script: str, arguments: list[str]) -> None:
    """Raise ValueError if `--spec` names a module or spec that the script would not find."""
    named, before = named_specs.named_spec(arguments), list(sys.path)
    sys.path[:] = _path_of(script)
    try:
        if named and (not named_specs.is_there(named[0]) or named_specs.is_no_spec(*named)):
            raise ValueError(named_specs.sentence(*named))
    finally:
        sys.path[:] = before


def _leave_process_group() -> None:
    """Leave the process group if the script did not.

    A gloo thread that is in Python when the interpreter ends aborts the process, which then loses
    the script's exit code. If a peer is lost, an operation in flight may take gloo's full time-out
    to end; the wait here is limited so that the launcher learns of it sooner.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        leaving = threading.Thread(target=distributed.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(_SECONDS_TO_LEAVE)


def _launch(processes: int, script: str, arguments: list[str]) -> int:
    """Run the ranks with torch's launcher and return the exit code."""
    # With several ranks the launcher would set 1 for each.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    options = ["--standalone", "--nproc-per-node", str(processes), "-m", "kvshift_megatron.cpu"]
    # The ranks import what this process would import. A command on PATH does not look into the
    # working directory, where anybody may have put a torch.py.
    is_command = sys.path[0] not in ("", os.getcwd()) and _SAFE_PATH not in os.environ
    if is_command:
        os.environ[_SAFE_PATH] = _SET_HERE
    try:
        torchrun([*options, script, *arguments])
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        if is_command:
            del os.environ[_SAFE_PATH]
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status: the script's, if it ran."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        processes, script, arguments = _parse(argv)
        if script is None:
            print(_USAGE, file=sys.stdout if processes == 0 else sys.stderr)
            return 0 if processes == 0 else _fail("SCRIPT is missing.")
        if not os.path.isfile(script):
            return _fail(f"SCRIPT {script} does not exist.")
        cpu.check_flags(arguments)
        _check_spec(script, arguments)
    except ValueError as error:
        return _fail(str(error))
    if "LOCAL_RANK" in os.environ and "RANK" in os.environ:
        _run_worker(script, arguments)
        return 0
    return _launch(processes, script, arguments)


if __name__ == "__main__":
    sys.exit(main())
