"""The flags of a GPT model as those of the hybrid model that has the same layers."""

from kvshift_megatron.recipes import patterns
from kvshift_megatron.recipes.toml_flags import Flags

PATTERN = "hybrid-layer-pattern"

# They give layers by their numbers, or stages by numbers of layers, which a pattern says itself.
_UNTRANSLATED = (
    "pipeline-model-parallel-layout",
    "decoder-first-pipeline-num-layers",
    "decoder-last-pipeline-num-layers",
    "account-for-embedding-in-pipeline-split",
    "account-for-loss-in-pipeline-split",
    "encoder-num-layers",
    "heterogeneous-layers-config-path",
    "heterogeneous-layers-config-encoded-json",
    "linear-attention-freq",
    "moe-layer-freq",
    "multi-latent-attention",
    "no-rope-freq",
    "window-attn-skip-freq",
)
# What the pattern says instead.
_REPLACED = (
    "num-layers",
    "num-layers-per-virtual-pipeline-stage",
    "num-virtual-stages-per-pipeline-rank",
    "mtp-num-layers",
)


def hybrid_form(flags: Flags) -> Flags:
    """Return the flags with a hybrid layer pattern in place of the number of layers.

    A GPT layer becomes attention (`*`) and an MLP (`-`) or experts (`E`). Pipeline stages and their
    chunks become segments; a depth of multi-token prediction becomes `/` and its layers;
    recompute-num-layers counts twice as many. Flags that hold a pattern already stay as they are.

    Raises:
        ValueError: A flag has no counterpart, or a number does not divide the layers.
    """
    given = {name: value for name, value in flags.items() if value is not False}
    if PATTERN in given:
        return flags
    if wrong := [name for name in _UNTRANSLATED if name in given]:
        raise ValueError(
            f"{wrong[0]} counts layers of a GPT model, which --hybrid cannot translate: leave "
            f"--hybrid out, or write the layers and stages out with --set '{PATTERN}=*-*-|*-*-'"
        )
    layer = "*E" if "num-experts" in given else "*-"
    layers = _number(given, "num-layers")
    pattern = patterns.repeated(layer, layers, _segments(given, layers))
    if "mtp-num-layers" in given:
        pattern += (patterns.MTP + layer) * _number(given, "mtp-num-layers")
    translated: Flags = {}
    for name, value in flags.items():
        if name == "num-layers":
            translated[PATTERN] = pattern
        elif name == "recompute-num-layers" and name in given:
            translated[name] = len(layer) * _number(given, name)
        elif name not in _REPLACED:
            translated[name] = value
    return translated


def one_form(flags: Flags, overrides: Flags) -> Flags:
    """Return the flags without a file's num-layers if there is a pattern, as Megatron would do.

    Args:
        flags: All flags, overrides included.
        overrides: Those that the user wrote; a num-layers among them stays, to be checked.
    """
    if flags.get(PATTERN, False) is False or "num-layers" in overrides:
        return flags
    return {name: value for name, value in flags.items() if name != "num-layers"}


def _segments(given: Flags, layers: int) -> int:
    """Return the number of model chunks on all pipeline stages together."""
    stages = chunks = 1
    if "pipeline-model-parallel-size" in given:
        stages = _number(given, "pipeline-model-parallel-size")
    if "num-virtual-stages-per-pipeline-rank" in given:
        chunks = _number(given, "num-virtual-stages-per-pipeline-rank")
    segments, named = stages * chunks, "PP x chunks"
    if "num-layers-per-virtual-pipeline-stage" in given:
        per_chunk = _number(given, "num-layers-per-virtual-pipeline-stage")
        segments, named = max(1, layers // per_chunk), "PP x num-layers-per-virtual-pipeline-stage"
        if layers % (stages * per_chunk):
            raise ValueError(
                f"num-layers is {layers}: it must be divisible by {named} = {stages * per_chunk}"
            )
    if layers % segments:
        raise ValueError(f"num-layers is {layers}: it must be divisible by {named} = {segments}")
    return segments if stages > 1 else 1


def _number(given: Flags, name: str) -> int:
    try:
        number = int(str(given.get(name)))
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a whole number above 0, got {given.get(name)!r}")
    return number
