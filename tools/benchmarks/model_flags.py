"""Make command lines for Megatron's loop on its own mock data."""


def model_flags(
    layers: int, hidden: int, heads: int, query_groups: int, seq_length: int, batch: int
) -> list[str]:
    """Return the flags of a Llama-style GPT, for a run that ends only when it is told to."""
    ffn = 64 * round(hidden * 8 / 3 / 64)
    values = {
        "num-layers": layers,
        "hidden-size": hidden,
        "ffn-hidden-size": ffn,
        "num-attention-heads": heads,
        "group-query-attention": None,
        "num-query-groups": query_groups,
        "seq-length": seq_length,
        "max-position-embeddings": seq_length,
        "micro-batch-size": batch,
        "global-batch-size": batch,
        "train-iters": 100_000,
        "lr": 1e-4,
        "lr-decay-style": "constant",
        "vocab-size": 4000,
        "tokenizer-type": "NullTokenizer",
        "mock-data": None,
        "num-workers": 0,
        "log-interval": 1_000,
        "eval-iters": 0,
        "eval-interval": 1_000_000,
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
        "swiglu": None,
        "disable-bias-linear": None,
        "untie-embeddings-and-output-weights": None,
        "hidden-dropout": 0.0,
        "attention-dropout": 0.0,
        "no-create-attention-mask-in-dataloader": None,
        "seed": 1,
    }
    flags = []
    for name, value in values.items():
        flags += [f"--{name}"] + ([] if value is None else [str(value)])
    return flags
