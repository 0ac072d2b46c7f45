"""Flags of a GPT small enough to train in seconds, on Megatron's own mock data."""

from pathlib import Path


def flags(**overrides: object) -> list[str]:
    """Return command-line flags; an override of None drops a flag, True makes it a switch.

    A text is split at spaces, and a path is one word.
    """
    values = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "seq_length": 32,
        "max_position_embeddings": 32,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "train_iters": 20,
        "lr": 1e-3,
        "mock_data": True,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": 128,
        "log_interval": 1,
        "eval_iters": 0,
        "eval_interval": 1000,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
    }
    command = []
    for name, value in {**values, **overrides}.items():
        if value is None:
            continue
        command.append("--" + name.replace("_", "-"))
        if value is not True:
            command += [str(value)] if isinstance(value, Path) else str(value).split()
    return command
