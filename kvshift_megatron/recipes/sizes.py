"""Check that the sizes of a run divide each other: arithmetic on its flags, without Megatron."""

from argparse import Namespace

from kvshift_megatron.recipes import patterns
from kvshift_megatron.recipes.toml_flags import Flags

# Megatron's defaults.
NUMBERS = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "micro_batch_size": None,
    "global_batch_size": None,
    "seq_length": None,
    "num_layers": None,
    "num_attention_heads": None,
    "num_query_groups": 1,
    "ffn_hidden_size": None,
    "train_iters": None,
}
OTHERS = {
    "group_query_attention": False,
    "sequence_parallel": False,
    "pipeline_model_parallel_layout": None,
    "hybrid_layer_pattern": None,
}


def arguments(flags: Flags) -> Namespace:
    """Return the flags under the names that Megatron's parser gives them.

    Raises:
        ValueError: A size is no whole number, or the layer pattern is no text.
    """
    given = {name.replace("-", "_"): value for name, value in flags.items() if value is not False}
    if not isinstance(pattern := given.get("hybrid_layer_pattern", "*-"), str) or not pattern:
        raise ValueError(f"hybrid-layer-pattern must be layers such as *-*-, got {pattern!r}")
    numbers = {name: _whole(name, given[name]) for name in NUMBERS if name in given}
    return Namespace(**{**NUMBERS, **OTHERS, **given, **numbers})


def check_sizes(nproc: int, args: Namespace) -> None:
    """Raise ValueError if a size is not divisible by what must divide it.

    Args:
        nproc: Processes in all.
        args: Megatron's arguments, or what `arguments` returns.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, heads = args.context_parallel_size, args.num_attention_heads
    _divides("the number of processes", nproc, "TP x PP x CP", tp * pp * cp)
    _divides("global-batch-size", args.global_batch_size, "micro-batch-size x DP",
             (args.micro_batch_size or 0) * data_parallel_size(nproc, args))  # fmt: skip
    _divides("num-attention-heads", heads, "TP", tp)
    _divides("ffn-hidden-size", args.ffn_hidden_size, "TP", tp)
    if args.hybrid_layer_pattern is not None:
        _check_pattern(args.hybrid_layer_pattern, args.num_layers, pp)
    elif args.pipeline_model_parallel_layout is None:
        _divides("num-layers", args.num_layers, "PP", pp)
    if cp > 1:
        _divides("seq-length", args.seq_length, "2 x CP", 2 * cp)
    if args.sequence_parallel:
        _divides("seq-length", args.seq_length, "TP x CP", tp * cp)


def data_parallel_size(nproc: int, args: Namespace) -> int:
    """Return the number of model replicas, each of which takes its share of the batch."""
    return nproc // (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )


def _check_pattern(pattern: str, num_layers: int | None, pp: int) -> None:
    layers, stages = len(patterns.main_layers(pattern)), patterns.stages(pattern)
    if num_layers not in (None, layers):
        raise ValueError(
            f"num-layers is {num_layers}, but hybrid-layer-pattern {pattern} has {layers} layers: "
            "leave num-layers out"
        )
    if stages > 1:
        _divides(f"the number of stages in hybrid-layer-pattern {pattern}", stages, "PP", pp)
    else:
        # Megatron cuts it by itself.
        _divides(f"the number of layers in hybrid-layer-pattern {pattern}", layers, "PP", pp)


def _divides(whole_name: str, whole: int | None, parts_name: str, parts: int | None) -> None:
    if not whole or not parts or whole % parts:
        raise ValueError(f"{whole_name} is {whole}: it must be divisible by {parts_name} = {parts}")


def _whole(name: str, value: object) -> int:
    try:
        if not isinstance(value, bool):
            return int(str(value))
    except ValueError:
        pass
    raise ValueError(f"{name.replace('_', '-')} must be a whole number, got {value!r}")
