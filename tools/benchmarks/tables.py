"""Format the result as Markdown, to be pasted into a README."""

from collections.abc import Iterable

from tools.benchmarks.results import not_measured

_STEP_NAMES = {
    "vanilla": "baseline model",
    "vanilla_fresh_pages": "baseline model, system's memory handling",
    "kv_shift": "KV shifting",
    "kv_shift_eager": "KV shifting, plain PyTorch",
    "llama": "Llama",
}


def markdown(result: dict) -> str:
    """Return tables of every section that was measured: medians, with quartiles in brackets."""
    makers = {
        "operation": _operation,
        "pages": _pages,
        "step": _step,
        "decode": _decode,
        "scaling": _scaling,
        "conversion": _conversion,
    }
    parts = [_machine(result["machine"])]
    for name, section in result["sections"].items():
        parts += makers[name](section)
    missing = list(not_measured(result))
    if missing:
        parts.append("\n".join(f"- {what}: not measured ({why})" for what, why in missing))
    return "\n\n".join(parts) + "\n"


def _machine(machine: dict) -> str:
    names = ("torch", "triton", "megatron-core", "transformers")
    versions = ", ".join(f"{name} {machine[name]}" for name in names if machine[name])
    gpus = ", ".join(machine["gpus"]) if machine["gpus"] else "no GPU"
    return (
        f"{machine['time'][:10]}: {machine['cpu']}, {machine['threads']} threads, {gpus}; Python "
        f"{machine['python']}, {versions}; {machine['compiler'] or 'no C compiler'}."
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figure(value: float) -> str:
    """Format to three significant digits; from 100 up, to a whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _spread(summary: dict, unit: float = 1.0) -> str:
    low, high = (_figure(summary[f"{name}_quartile"] / unit) for name in ("lower", "upper"))
    return f"{_figure(summary['median'] / unit)} ({low} to {high})"


def _operation(section: dict) -> list[str]:
    found = []
    kept = section["keeps_freed_memory"]
    memory = "freed memory kept" if kept else "the system's memory handling"
    for device in dict.fromkeys(case["device"] for case in section["cases"]):
        cases = [case for case in section["cases"] if case["device"] == device]
        kind = "forward and backward"
        labels = {row["candidate"]: row["label"] for case in cases for row in case["rows"]}
        head = [f"{kind}, all gradients"] + [f"{c['dtype']} {c['shape']}" for c in cases]
        rows = [["a copy, ms"] + [_spread(c["copy_seconds"], 1e-3) for c in cases]]
        rows.append(["the bound"] + [_figure(c["bound_copies"][kind]) for c in cases])
        for name, label in labels.items():
            rows.append([label] + [_cell(case, name, kind) for case in cases])
        compiling = [case["compile_seconds"] for case in cases]
        rows.append(["torch.compile's first call, s"] + [_seconds(s) for s in compiling])
        found.append(
            f"The shift on the {device} device, in multiples of a copy of keys and values "
            f"(median and quartiles{f'; {memory}' if device == 'cpu' else ''}):\n\n"
            + _table(head, rows)
        )
        head[0] = "forward"
        rows = [
            [label] + [_cell(c, name, "forward") for c in cases] for name, label in labels.items()
        ]
        found.append(_table(head, [["the bound"] + ["1"] * len(cases), *rows]))
    return found


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}"


def _cell(case: dict, candidate: str, kind: str) -> str:
    for row in case["rows"]:
        if (row["candidate"], row["pass"]) == (candidate, kind):
            return _spread(row["copies"])
    return "not measured"


def _pages(section: dict) -> list[str]:
    kinds = [name for name in ("system", "kept") if name in section]
    titles = {"system": "the system's memory handling", "kept": "freed memory kept"}
    rows = []
    for title, pick in (
        ("copy into existing memory", lambda case: case["copy_seconds"]),
        ("copy into new memory", lambda case: _in_seconds(case)),
    ):
        rows.append([title] + [_spread(pick(section[kind]), 1e-3) for kind in kinds])
    for row in section[kinds[0]]["rows"]:
        cells = [
            _spread(other["seconds"], 1e-3)
            for kind in kinds
            for other in section[kind]["rows"]
            if (other["candidate"], other["pass"]) == (row["candidate"], row["pass"])
        ]
        rows.append([f"{row['label']}, {row['pass']}", *cells])
    case = section[kinds[0]]
    head = [f"ms, {case['dtype']} {case['shape']}"] + [titles[kind] for kind in kinds]
    return ["Fresh pages on a CPU:\n\n" + _table(head, rows)]


def _in_seconds(case: dict) -> dict:
    unit = case["copy_seconds"]["median"]
    return {k: v if k == "count" else v * unit for k, v in case["clone_copies"].items()}


def _runs(section: dict) -> list[list[str]]:
    return [
        [
            _STEP_NAMES[name],
            _spread(run["tokens_per_second"]),
            _spread(run["ratio"]),
            f"{run['peak_bytes'] / 2**20:.0f}",
            f"{run['saved_bytes_a_layer'] / 2**20:.2f}",
        ]
        for name, run in section["runs"].items()
    ]


_RUN_HEAD = (
    "tokens/s",
    "relative to the baseline model",
    "peak memory, MiB",
    "kept for backward per layer, MiB",
)


def _step(section: dict) -> list[str]:
    if "runs" not in section:
        return []
    model = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in section["model"].items())
    head = [f"step, {section['dtype']}", *_RUN_HEAD]
    return [f"Megatron's training step ({model}):\n\n" + _table(head, _runs(section))]


def _decode(section: dict) -> list[str]:
    rows = [
        [f"{_STEP_NAMES[name]}, batch {case['batch']}", _spread(run["tokens_per_second"]),
         _spread(run["ratio"])]
        for case in section["cases"]
        for name, run in case["runs"].items()
    ]  # fmt: skip
    title = f"Decoding in Transformers ({section['device']}, {section['dtype']}):"
    return [title + "\n\n" + _table(["model", "tokens/s", "relative to Llama"], rows)]


def _scaling(section: dict) -> list[str]:
    rows = []
    for axis, cases in section["operation"].items():
        for case in cases:
            cells = [_cell(case, name, "forward and backward") for name in ("chosen", "eager")]
            rows.append([f"{axis}: {case['shape']}", *cells])
    head = ["operation, copies (forward and backward)", "kvshift", "kvshift, plain PyTorch"]
    found = ["As shapes and ranks grow:\n\n" + _table(head, rows)]
    rows = []
    for name, layout in section["layouts"].items():
        run = layout["runs"]["kv_shift"]
        baseline = layout["runs"]["vanilla"]
        rows.append(
            [name, _spread(baseline["tokens_per_second"]), _spread(run["tokens_per_second"]),
             _spread(run["ratio"])]
        )  # fmt: skip
    if rows:
        head = ["step, tokens/s", "baseline model", "KV shifting", "relative to the baseline model"]
        found.append(_table(head, rows))
    return found


def _conversion(section: dict) -> list[str]:
    rows = [[name, _spread(s, 1e9)] for name, s in section["bytes_per_second"].items()]
    title = f"Converting a model of {section['bytes'] / 1e6:.0f} MB (files in the page cache):"
    tables = [title + "\n\n" + _table(["command", "GB/s"], rows)]
    written = _spread(section["tokens_per_second"], 1e6)
    return [*tables, f"Writing Megatron's indexed dataset: {written} million tokens/s."]
