"""Compute the logits of Baichuan-M1 folders with mlx-lm, a public client of that layout.

    python -m kvshift_megatron.convert.baichuan.mlx_logits RUNS.json LOGITS.npz

A separate program that needs neither PyTorch nor Megatron.
"""

import argparse
import json
import os
from pathlib import Path

from kvshift_megatron.utils.output_paths import check_outputs

# Compiling kernels would take longer than a few prompts. mlx reads this when it is imported.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")


def main() -> None:
    """Read the runs from RUNS.json and write one fp32 array [tokens, vocab] per prompt, in order.

    A run is {"folder": ..., "prompts": [[token ids], ...], "by_token": whether to decode token by
    token, with the cache}.
    """
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("logits", type=Path)
    options = parser.parse_args()
    requested = json.loads(options.runs.read_text())
    check_outputs([options.logits], [options.runs, *(Path(run["folder"]) for run in requested)])
    mx.set_default_device(mx.cpu)
    results = []
    for run in requested:
        model, _ = load_model(Path(run["folder"]))
        model.set_dtype(mx.float32)
        for prompt in run["prompts"]:
            tokens = mx.array([prompt])
            if run["by_token"]:
                cache = model.make_cache()
                steps = [model(tokens[:, i : i + 1], cache=cache) for i in range(len(prompt))]
                logits = mx.concatenate(steps, axis=1)
            else:
                logits = model(tokens)
            results.append(np.array(logits[0].astype(mx.float32)))
    np.savez(options.logits, *results)


if __name__ == "__main__":
    main()
