"""Draw memory by pipeline stage."""

from pathlib import Path

from kvshift_megatron.planning.estimate import Assumptions
from kvshift_megatron.planning.gpus import GPU
from kvshift_megatron.utils.atomic_files import replace

# From the bottom of a bar: what is always there first, what comes and goes last.
_PARTS = (
    ("parameters", ("parameter_bytes",), "#2f4b7c"),
    ("gradients", ("gradient_bytes",), "#6a76ad"),
    ("optimizer", ("main_parameter_bytes", "moment_bytes", "other_optimizer_bytes"), "#a9a7d6"),
    ("saved activations", ("saved_peak",), "#e8875a"),
    ("transient", ("transient_bytes",), "#f6c9a0"),
)


def draw(
    planned: dict, title: str, gpu_name: str, gpu: GPU, assumed: Assumptions, path: Path
) -> None:
    """Write a PNG: a bar per stage, the GPU's memory, and what the reserve leaves of it."""
    from matplotlib.figure import Figure

    stages, baseline = planned["stages"], planned["twin_stages"]
    figure = Figure(figsize=(max(5.5, 1.2 * len(stages) + 3.5), 4.2), layout="constrained")
    axes = figure.add_subplot()
    width = 0.38 if baseline else 0.6
    kinds = [(stages, -width / 2 if baseline else 0.0, 1.0)]
    kinds += [(baseline, width / 2, 0.45)] if baseline else []
    highest = 0.0
    for bars, shift, alpha in kinds:
        places = [place + shift for place in range(len(bars))]
        bottoms = [0.0] * len(bars)
        for name, keys, colour in _PARTS:
            heights = [sum(stage[key] for key in keys) / 1e9 for stage in bars]
            label = name if bars is stages else None
            axes.bar(places, heights, width * 0.94, bottom=bottoms, label=label, color=colour,
                     alpha=alpha)  # fmt: skip
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights)]
        for place, total in zip(places, bottoms):
            axes.text(place, total, f"{total:.1f}", ha="center", va="bottom", fontsize=8)
        highest = max(highest, *bottoms)
    memory, usable = gpu.memory / 1e9, (gpu.memory - assumed.reserve) / 1e9
    axes.axhline(memory, color="black", linewidth=1, label=f"{gpu_name}: {memory:.0f} GB")
    axes.axhline(
        usable, color="black", linewidth=1, linestyle="--", label=f"less the reserve: {usable:.0f}"
    )
    axes.set_xlim(-0.7, len(stages) - 0.3)
    axes.set_ylim(0, max(memory, highest) * 1.12)
    axes.set_xticks(range(len(stages)), [f"stage {stage['stage']}" for stage in stages])
    if baseline:
        axes.set_xlabel("left: with KV shifting; right, paler: the baseline model", fontsize=8)
    axes.set_ylabel("GB per GPU")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    replace(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
