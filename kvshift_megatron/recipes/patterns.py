"""Hybrid layer patterns as text, without Megatron: `*-*-|*-*-/*-`.

Each symbol is a layer, `|` begins a pipeline stage (or a chunk of one), and `/` the layers of a
depth of multi-token prediction.
"""

STAGE, MTP = "|", "/"


def main_layers(pattern: str) -> str:
    """Return the symbols of all layers before multi-token prediction, without the stages."""
    return pattern.partition(MTP)[0].replace(STAGE, "")


def stages(pattern: str) -> int:
    """Return into how many segments `|` divides the layers; 1 without any."""
    return pattern.partition(MTP)[0].count(STAGE) + 1


def unit(pattern: str) -> str:
    """Return the shortest sequence that the layers repeat, such as `*-`; all of them if none is."""
    layers = main_layers(pattern)
    return next(
        layers[:length]
        for length in range(1, len(layers) + 1)
        if layers[:length] * (len(layers) // length) == layers
    )


def repeated(block: str, count: int, segments: int = 1) -> str:
    """Return a pattern of `count` blocks in as many equal segments, which must divide them."""
    return STAGE.join([block * (count // segments)] * segments)
