"""Which flags must be given, and which must fit each other.

As in `flag_ranges`: what Megatron trains with is not refused, and what only it knows is left to it.
"""

from argparse import Namespace
from collections.abc import Iterator

from kvshift_megatron.training.flag_ranges import flag_of


def check_relations(args: Namespace) -> None:
    """Raise ValueError for flags that are missing or contradict each other.

    Args:
        args: Megatron's, as parsed, with what it takes from a checkpoint.
    """
    for relations in (_given, _model, _hybrid, _layout, _batches, _length, _schedule):
        for sentence in relations(args):
            raise ValueError(sentence)


def _given(args: Namespace) -> Iterator[str]:
    needed = {
        "num_layers": args.num_layers or args.encoder_num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "seq_length": args.seq_length or args.encoder_seq_length,
        "max_position_embeddings": args.max_position_embeddings,
        "micro_batch_size": args.micro_batch_size,
    }
    if not args.skip_train:
        needed["lr"] = args.lr is not None
        if not args.full_validation:
            needed["eval_interval"] = (args.eval_interval or 0) > 0
    if args.save is not None:
        needed["save_interval"] = args.save_interval
    for name, value in needed.items():
        if not value:
            shown = getattr(args, name)
            wrong = "is not set" if shown is None else f"{shown} is out of range"
            yield f"{flag_of(name)} {wrong}: give a value above 0"


def _model(args: Namespace) -> Iterator[str]:
    heads, channels = args.num_attention_heads, args.kv_channels
    if channels is None:
        if args.hidden_size % heads:
            yield (
                f"--hidden-size {args.hidden_size} must be divisible by --num-attention-heads "
                f"{heads}, unless --kv-channels is given"
            )
        channels = args.hidden_size // heads
    if args.group_query_attention and heads % args.num_query_groups:
        yield (
            f"--num-attention-heads {heads} must be divisible by --num-query-groups "
            f"{args.num_query_groups}"
        )
    rotates = args.position_embedding_type == "rope" or args.use_rotary_position_embeddings
    rotated = int(channels * min(args.rotary_percent, 1.0))
    if rotates and (rotated % 2 or not rotated):
        yield (
            f"RoPE rotates channels in pairs, and --rotary-percent {args.rotary_percent:g} of "
            f"{channels} channels per head is {rotated}: change --kv-channels, or --hidden-size "
            "and --num-attention-heads"
        )
    length = args.seq_length or args.encoder_seq_length
    if args.max_position_embeddings < length:
        yield (
            f"--max-position-embeddings {args.max_position_embeddings} must not be below "
            f"--seq-length {length}"
        )
    if args.num_experts and args.moe_router_topk > args.num_experts:
        yield (
            f"--moe-router-topk {args.moe_router_topk} must not be above --num-experts "
            f"{args.num_experts}"
        )


def _hybrid(args: Namespace) -> Iterator[str]:
    """Yield what Megatron's GPT model does, and its hybrid model would leave out in silence."""
    if not args.hybrid_layer_pattern:
        return
    if args.use_rope_scaling:
        yield (
            "--use-rope-scaling has no effect on a hybrid model: leave it out, or give "
            "--num-layers in place of --hybrid-layer-pattern"
        )
    if args.position_embedding_type in ("mrope", "relative"):
        yield (
            f"--position-embedding-type {args.position_embedding_type} has no effect on a hybrid "
            "model: use rope, yarn, learned_absolute or none"
        )


def _layout(args: Namespace) -> Iterator[str]:
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    if args.world_size % (tp * pp * cp):
        yield (
            f"the number of processes, {args.world_size}, must be divisible by "
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x "
            f"--context-parallel-size {cp}"
        )
    split = {"num_attention_heads": args.num_attention_heads}
    if not args.num_experts:
        split["ffn_hidden_size"] = args.ffn_hidden_size
    split["padded_vocab_size"] = args.padded_vocab_size
    for name, value in split.items():
        if value is not None and value % tp:
            yield (
                f"{flag_of(name)} {value} must be divisible by --tensor-model-parallel-size {tp}"
            )
    yield from _stages(args, pp)
    length = args.seq_length or args.encoder_seq_length
    if cp > 1 and length % (2 * cp):
        yield (
            f"--seq-length {length} must be divisible by {2 * cp}, twice --context-parallel-size "
            f"{cp}"
        )
    is_packed = args.sft or args.dataloader_inter_document_masking
    if args.sequence_parallel and tp > 1 and not is_packed and (length // cp) % tp:
        yield (
            f"--seq-length {length} on --context-parallel-size {cp} must be divisible by "
            f"--tensor-model-parallel-size {tp} with --sequence-parallel"
        )


def _stages(args: Namespace, pp: int) -> Iterator[str]:
    uneven = (
        args.hybrid_layer_pattern,
        args.pipeline_model_parallel_layout,
        args.num_layers_per_virtual_pipeline_stage,
        args.num_virtual_stages_per_pipeline_rank,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
    )
    if any(value is not None for value in uneven):
        return  # Megatron says what does not fit
    layers = args.num_layers or args.encoder_num_layers
    counted = layers + bool(args.account_for_embedding_in_pipeline_split)
    counted += bool(args.account_for_loss_in_pipeline_split)
    if counted % pp:
        more = "" if counted == layers else f" (with the embedding and the loss: {counted})"
        yield (
            f"--num-layers {layers}{more} must be divisible by --pipeline-model-parallel-size "
            f"{pp}, unless --pipeline-model-parallel-layout or the like says which stage has which"
        )


def _batches(args: Namespace) -> Iterator[str]:
    if args.tensor_parallel_num_weight_shards is not None:
        return  # the number of replicas is another one
    replicas = args.world_size // (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    micro, batch = args.micro_batch_size, args.global_batch_size
    may_shrink = args.decrease_batch_size_if_needed
    if batch is not None and not may_shrink and batch % (micro * replicas):
        yield (
            f"--global-batch-size {batch} must be divisible by --micro-batch-size {micro} x "
            f"{replicas} data-parallel replicas"
        )
    evaluated = args.eval_global_batch_size or batch
    one = args.eval_micro_batch_size or micro
    if evaluated is not None and evaluated % (one * replicas):
        yield (
            f"--eval-global-batch-size {evaluated} must be divisible by --eval-micro-batch-size "
            f"{one} x {replicas} data-parallel replicas (by default they are --global-batch-size "
            "and --micro-batch-size)"
        )


def _length(args: Namespace) -> Iterator[str]:
    if args.skip_train:
        return
    if not (args.train_iters or args.train_samples):
        yield "--train-iters is not set: give it, or --train-samples"
    if args.train_iters and args.train_samples:
        yield "--train-iters and --train-samples are both set: drop one of the two"
    ours, other = ("iters", "samples") if args.train_iters else ("samples", "iters")
    for name in ("lr_decay", "lr_warmup"):
        if getattr(args, f"{name}_{other}"):
            flag = flag_of(f"{name}_{other}")
            yield f"{flag} does not go with --train-{ours}: use {flag_of(f'{name}_{ours}')}"
    if args.lr_warmup_fraction is not None and getattr(args, f"lr_warmup_{ours}"):
        yield f"--lr-warmup-fraction and --lr-warmup-{ours} are both set: drop one of the two"
    decay = getattr(args, f"lr_decay_{ours}")
    name = f"--train-{ours}" if decay is None else f"--lr-decay-{ours}"
    decay = decay or getattr(args, f"train_{ours}")
    if args.lr_warmup_fraction is None and getattr(args, f"lr_warmup_{ours}") >= decay:
        yield (
            f"--lr-warmup-{ours} {getattr(args, f'lr_warmup_{ours}')} must be below {name} {decay}"
        )
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{ours}") is None:
        yield f"--lr-wsd-decay-{ours} is not set, which --lr-decay-style WSD needs"


def _schedule(args: Namespace) -> Iterator[str]:
    if args.skip_train:
        return
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(args, name) > args.lr:
            yield f"{flag_of(name)} {getattr(args, name):g} must not be above --lr {args.lr:g}"
    bounds = {name: getattr(args, name) for name in ("start_weight_decay", "end_weight_decay")}
    style = args.weight_decay_incr_style
    for name, value in bounds.items():
        if style == "constant" and value is not None:
            yield (
                f"{flag_of(name)} goes only with --weight-decay-incr-style linear or cosine: "
                "use --weight-decay"
            )
        if style != "constant" and value is None:
            yield f"{flag_of(name)} is not set, which --weight-decay-incr-style {style} needs"
    start, end = bounds.values()
    if start is not None and start > end:
        yield f"--start-weight-decay {start:g} must not be above --end-weight-decay {end:g}"
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        yield (
            "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler are both set: "
            "drop one of the two"
        )
