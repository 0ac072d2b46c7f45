"""Compare the logits of a Megatron checkpoint and a Hugging Face folder, on the CPU."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvshift_megatron.config import Variant
from kvshift_megatron.convert.formats.safetensors_files import SafetensorsFolder, read_json
from kvshift_megatron.convert.formats.torch_dist import TorchDistReader
from kvshift_megatron.convert.from_hf_config import layout_of
from kvshift_megatron.convert.megatron_model import (
    build_model,
    fill_model,
    megatron_logits,
    one_rank,
)
from kvshift_megatron.convert.to_hf import MegatronTable, fitting_layout, read_architecture
from kvshift_megatron.utils.launchers import own_path

# Largest difference of two logits, relative to the largest logit. Both models compute in fp32, from
# weights that were rounded to the same dtype.
TOLERANCE = 1e-4
# Clients of Baichuan's layout round lm_head to its dtype once more when they normalize it.
_TOLERANCE_OF_CLIENTS = {torch.float32: TOLERANCE, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_FINE_TO_COARSE = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
_LONGEST = 2048  # tokens; longer prompts take more memory than the model, for its logits
_BEYOND = 64  # tokens after the end of a window
_WINDOWS = ("sliding_window", "attention_chunk_size")  # in tokens, in the classes of Transformers


def verify(
    checkpoint: Path,
    folder: Path,
    vocab_size: int | None = None,
    variant: Variant | None = None,
    tokenizer: Path | None = None,
) -> float:
    """Compare the two models' logits on random and edge-case prompts, and print the result.

    Args:
        checkpoint: Megatron's checkpoint.
        folder: Hugging Face's folder; mlx-lm runs baichuan_m1.
        vocab_size, variant, tokenizer: As given to the conversion.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        ValueError: The difference is above the tolerance.
    """
    reader = TorchDistReader(checkpoint)
    architecture = read_architecture(reader, vocab_size, variant, tokenizer)
    # Any layout that fits will do to read Megatron's side.
    layout = fitting_layout(architecture)
    files = SafetensorsFolder(folder)
    dtypes = {files.dtype(name) for name in files.names()}
    coarsest = max(dtypes | reader.dtypes(), key=_FINE_TO_COARSE.index)
    rounded = None if dtypes == reader.dtypes() else coarsest
    table = MegatronTable(reader, layout, architecture, rounded)
    is_baichuan = layout_of(read_json(folder / "config.json"), folder) == "baichuan_m1"
    window = 0 if is_baichuan else longest_window(folder)
    prompts = edge_case_prompts(
        architecture.vocab_size, architecture.max_position_embeddings, window
    )
    tolerance = TOLERANCE
    if is_baichuan:
        (theirs,) = mlx_logits([Run(folder, prompts)])
        tolerance = _TOLERANCE_OF_CLIENTS.get(coarsest, TOLERANCE)
    else:
        theirs = transformers_logits(folder, prompts, rounded)
    with one_rank():
        model = build_model(architecture)
        fill_model(model, table.rows, table.megatron)
        ours = megatron_logits(model, prompts, architecture.vocab_size)
    difference = largest_difference(ours, theirs)
    print(f"largest difference of logits: {difference:.3g} (tolerance {tolerance:g})")
    if not difference <= tolerance:
        raise ValueError(
            f"verify: the logits of {checkpoint} and {folder} differ by {difference:.3g} of the "
            f"largest, above {tolerance:g}: the conversion is wrong, or one of the two is damaged"
        )
    return difference


def longest_window(folder: Path) -> int:
    """Return the longest window of attention, in tokens, that Transformers reads from a folder.

    The library's class says it, as the file may leave it out; 0 if there is none.
    """
    from transformers import AutoConfig

    import kvshift_megatron.hf  # noqa: F401  (registers the model)

    config = AutoConfig.from_pretrained(folder)
    return max(getattr(config, name, None) or 0 for name in _WINDOWS)


def edge_case_prompts(vocab_size: int, max_positions: int, window: int = 0) -> list[list[int]]:
    """Return prompts: one token, first and last id, repetitions, random, and a long one.

    Args:
        vocab_size: Number of tokens that exist.
        max_positions: Largest number of tokens in a prompt.
        window: Length of a window that the long prompt has to reach beyond.
    """
    generator = torch.Generator().manual_seed(0)
    longest = min(max_positions, max(_LONGEST, window + _BEYOND if window else 0))

    def random(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    few = min(8, longest)
    return [
        [vocab_size // 2],
        [0, vocab_size - 1] * (few // 2) or [0],
        [vocab_size - 1] * few,
        random(min(33, longest)),
        random(longest),
    ]


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference of two logits, relative to the largest logit; NaN if any is."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            raise ValueError(
                f"verify: the logits have the shapes {list(one.shape)} and {list(other.shape)}"
            )
        scale = one.abs().max().clamp(min=1e-3)
        difference = ((one - other).abs().max() / scale).item()
        worst = difference if difference != difference else max(worst, difference)
        if worst != worst:
            break
    return worst


@torch.no_grad()
def transformers_logits(
    folder: Path, prompts: list[list[int]], rounded: torch.dtype | None = None
) -> list[Tensor]:
    """Compute logits with Transformers: fp32 [tokens, vocab] for each prompt.

    Args:
        folder: Hugging Face's folder.
        prompts: Token ids.
        rounded: Dtype that the weights are first rounded to; None leaves them as they are.
    """
    from transformers import AutoModelForCausalLM

    import kvshift_megatron.hf  # noqa: F401  (registers the model)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(rounded or parameter.dtype))
    return [model(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts]


class Run(NamedTuple):
    """A folder for mlx-lm to run; with by_token, one token at a time, using its cache."""

    folder: Path
    prompts: list[list[int]]
    by_token: bool = False


def mlx_logits(runs: list[Run]) -> list[list[Tensor]]:
    """Compute logits with mlx-lm, in a separate process.

    Returns:
        For every run, fp32 [tokens, vocab] for each prompt.

    Raises:
        ValueError: mlx-lm is missing, or fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch) / "runs.json", Path(scratch) / "logits.npz"
        request.write_text(
            json.dumps([{**run._asdict(), "folder": str(run.folder.resolve())} for run in runs])
        )
        # -P: anybody may have put modules into the working directory.
        command = [sys.executable, "-P", "-m", "kvshift_megatron.convert.baichuan.mlx_logits"]
        path = [*map(str, own_path()), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [*command, str(request), str(answer)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        )
        if done.returncode:
            raise ValueError(
                "the layout baichuan_m1 is verified with mlx-lm, which failed (to install it: pip "
                f"install 'mlx[cpu]' mlx-lm): {done.stderr.strip()[-2000:]}"
            )
        with np.load(answer) as arrays:
            logits = iter([torch.from_numpy(arrays[name]) for name in arrays.files])
    return [[next(logits) for _ in run.prompts] for run in runs]
