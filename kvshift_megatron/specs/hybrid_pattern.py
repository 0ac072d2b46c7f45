"""Read Megatron's hybrid layer patterns, such as `*-*-|*E*E/*-`."""

from argparse import Namespace

from kvshift_megatron.arguments import megatron_args
from kvshift_megatron.specs.hybrid_names import Symbols, parse_hybrid_pattern


def attention_numbers(pattern: str | None) -> dict[int, int]:
    """Return layer number -> number among the attention layers, both 1-based and global.

    Args:
        pattern: `--hybrid-layer-pattern`, or nothing. Its multi-token-prediction layers are not
            counted: they have numbers of their own.
    """
    main = (parse_hybrid_pattern(pattern).main_pattern or "").replace(Symbols.PIPE, "")
    layers = [number for number, kind in enumerate(main, 1) if kind == Symbols.ATTENTION]
    return {layer: number for number, layer in enumerate(layers, 1)}


def attention_numbers_of_the_run() -> dict[int, int]:
    """Return `attention_numbers` of the pattern in Megatron's arguments; empty without one."""
    return attention_numbers(pattern_in(megatron_args()))


def pattern_in(args: Namespace | None) -> str | None:
    """Return the pattern in Megatron's arguments, under its name or the older one."""
    names = ("hybrid_layer_pattern", "hybrid_override_pattern")
    return next(filter(None, (getattr(args, name, None) for name in names)), None)


def num_layers(pattern: str | None) -> int:
    """Return the number of layers before multi-token prediction, as Megatron counts them."""
    main = parse_hybrid_pattern(pattern).main_pattern or ""
    return len(main.replace(Symbols.PIPE, ""))
