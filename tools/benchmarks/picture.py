"""Draw the result, readable at a width of 800 pixels."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from kvshift_megatron.utils.atomic_files import replace

_KIND = "forward and backward"
# Okabe and Ito's colours, which colour-blind readers can distinguish, in a dark and a light shade.
_COLOURS = {"fp32": "#7a7a7a", "bf16": "#c4c4c4"}
_OWN_COLOURS = {"fp32": "#D55E00", "bf16": "#F0A868"}
_BOUND_COLOUR = "#0072B2"


def draw(result: dict, path: Path) -> bool:
    """Write the PNG of what was measured; return False if there is nothing to draw."""
    sections = result["sections"]
    rows = []
    if "operation" in sections:
        cases = sections["operation"]["cases"]
        for device in dict.fromkeys(case["device"] for case in cases):
            rows.append(("operation", [case for case in cases if case["device"] == device]))
    speeds = list(_speeds(sections))
    scaling = sections.get("scaling")
    if speeds or scaling:
        rows.append(("rest", None))
    if not rows:
        return False
    figure = Figure(figsize=(8, 3.6 * len(rows) + 0.5), dpi=150, layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for place, (kind, cases) in zip(parts, rows):
        if kind == "operation":
            _draw_operation(place, cases)
        else:
            wanted = [bool(speeds), bool(scaling)]
            axes = iter(place.subplots(1, sum(wanted), squeeze=False)[0])
            if speeds:
                _draw_speeds(next(axes), speeds)
            if scaling:
                _draw_scaling(next(axes), scaling["operation"])
    machine = result["machine"]
    note = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    figure.supxlabel(
        note + (", quick: do not quote" if result["quick"] else ""), fontsize=7, color="0.4"
    )
    replace(path, lambda temporary: figure.savefig(temporary, format="png"))
    return True


def _draw_operation(place, cases: list[dict]) -> None:
    shapes = list(dict.fromkeys(tuple(case["shape"]) for case in cases))
    labels = {row["candidate"]: row["label"] for case in cases for row in case["rows"]}
    own = {row["candidate"] for case in cases for row in case["rows"] if row["own"]}
    place.suptitle(
        f"Shifting keys and values on the {cases[0]['device'].upper()}: {_KIND}, all gradients",
        fontsize=11,
    )
    panels = place.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, shape in zip(panels, shapes):
        highest = 0.0
        for i, case in enumerate(case for case in cases if tuple(case["shape"]) == shape):
            dtype = case["dtype"]
            rows = {r["candidate"]: r["copies"] for r in case["rows"] if r["pass"] == _KIND}
            for y, name in enumerate(labels):
                if name not in rows:
                    continue
                middle = rows[name]["median"]
                low, high = (rows[name][f"{side}_quartile"] for side in ("lower", "upper"))
                colours = _OWN_COLOURS if name in own else _COLOURS
                place_y = y + (0.2 if i else -0.2)
                axes.barh(place_y, middle, 0.38, color=colours[dtype])
                axes.plot([low, high], [place_y] * 2, color="black", linewidth=0.8)
                text = f"{middle:.0f}" if middle >= 20 else f"{middle:.1f}"
                axes.text(
                    max(middle, high) * 1.06, place_y, f"{text}  {dtype}", va="center", fontsize=7
                )
                highest = max(highest, middle, high)
        bound = cases[0]["bound_copies"][_KIND]
        axes.axvline(bound, color=_BOUND_COLOUR, linestyle="--", linewidth=1.2)
        axes.text(
            bound, -0.62, f" bound: {bound:g}", color=_BOUND_COLOUR, fontsize=8, va="bottom"
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(1, max(highest, bound) * 6)
        axes.set_ylim(len(labels) - 0.5, -0.95)
        axes.set_yticks(range(len(labels)), labels.values(), fontsize=9)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"[s, b, ng, hn] = {list(shape)}", fontsize=9)
        axes.set_xlabel("times a plain copy of them (log)", fontsize=8)
        _tidy(axes)


def _speeds(sections: dict):
    """Yield (label, spread of the ratio to the baseline model, whether it is KV shifting)."""
    runs = sections.get("step", {}).get("runs", {})
    for name, label in (
        ("vanilla_fresh_pages", "step, baseline, fresh pages"),
        ("kv_shift", "step, KV shifting"),
        ("kv_shift_eager", "step, plain PyTorch shift"),
    ):
        if name in runs:
            yield label, runs[name]["ratio"], name == "kv_shift"
    for name, layout in sections.get("scaling", {}).get("layouts", {}).items():
        yield f"small step, {name}", layout["runs"]["kv_shift"]["ratio"], True
    for case in sections.get("decode", {}).get("cases", []):
        yield f"decode, batch {case['batch']}", case["runs"]["kv_shift"]["ratio"], True


def _draw_speeds(axes: Axes, speeds: list) -> None:
    for y, (_, ratio, own) in enumerate(speeds):
        colour = _OWN_COLOURS["fp32"] if own else _COLOURS["fp32"]
        ends = [ratio["lower_quartile"], ratio["upper_quartile"]]
        axes.plot(ends, [y, y], color=colour, linewidth=4, alpha=0.4, solid_capstyle="butt")
        axes.plot(ratio["median"], y, "o", color=colour, markersize=5)
        axes.text(
            ratio["median"],
            y - 0.18,
            f"{ratio['median']:.3f}",
            ha="center",
            va="bottom",
            fontsize=7,
        )
    axes.axvline(1.0, color=_BOUND_COLOUR, linestyle="--", linewidth=1.2)
    axes.set_ylim(len(speeds) - 0.5, -0.8)
    axes.set_yticks(range(len(speeds)), [label for label, _, _ in speeds], fontsize=8)
    axes.margins(x=0.12)
    axes.set_xlabel("tokens/s relative to the baseline model (decode: to Llama)", fontsize=8)
    axes.set_title("Whole training step and decoding", fontsize=10)
    _tidy(axes)


def _draw_scaling(axes: Axes, scaling: dict) -> None:
    ways = {
        "chosen": (_OWN_COLOURS["fp32"], "kvshift"),
        "eager": (_COLOURS["fp32"], "plain PyTorch"),
    }
    marks = {"sequence": ("o", "-", "sequence grows"), "heads": ("s", ":", "heads grow")}
    highest = 0.0
    for axis, cases in scaling.items():
        mark, line, what = marks[axis]
        for way, (colour, label) in ways.items():
            points = [
                (_elements(case), row["copies"]["median"])
                for case in sorted(cases, key=_elements)
                for row in case["rows"]
                if (row["candidate"], row["pass"]) == (way, _KIND)
            ]
            if points:
                name = f"{label}, {what}"
                axes.plot(*zip(*points), line, marker=mark, color=colour, markersize=4, label=name)
                highest = max(highest, *(y for _, y in points))
    axes.axhline(2.5, color=_BOUND_COLOUR, linestyle="--", linewidth=1.2, label="bound: 2.5")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(1, highest * 6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 2**20:g}M"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("elements of keys, bf16", fontsize=8)
    axes.set_ylabel("times a copy (log)", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title("The shift as shapes grow", fontsize=10)
    axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=1)
    _tidy(axes)


def _elements(case: dict) -> int:
    s, b, ng, hn = case["shape"]
    return s * b * ng * hn


def _tidy(axes: Axes) -> None:
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
