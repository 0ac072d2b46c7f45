"""Write exported folders, and the results they must give with any release of Transformers.

    python -m tests.hf.export DIRECTORY

DIRECTORY gets one folder per model, with its tokenizer, and expected.pt: the prompt, and each
model's greedy tokens and logits. `make test-transformers` runs this once, in the pinned
environment.
"""

import subprocess
import sys
from pathlib import Path

import torch

from tests.hf.models import tiny_model, tokens

MODELS = {
    "dense": {"kv_shift_window": 3, "tie_word_embeddings": True},
    "experts": {
        "kv_shift_variant": "gate",
        "num_local_experts": 4,
        "qk_norm": True,
        "qkv_bias": True,
    },
    "llama3": {
        "kv_shift_variant": "clamp",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}
NEW = 12  # tokens
WORKER = Path(__file__).with_name("exported_worker.py")


def write_tokenizer(folder: Path, words: int) -> None:
    """Write a tokenizer of the words "<pad>", "1", "2", ... with their numbers as ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {str(i) if i else "<pad>": i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<pad>", pad_token="<pad>"
    ).save_pretrained(folder)


def use(directory: Path) -> subprocess.CompletedProcess:
    """Use the folders as a user who has Transformers but not this package."""
    environment = {"PATH": "", "HOME": str(directory), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, WORKER, directory],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )


def main(directory: str) -> int:
    directory = Path(directory)
    prompt = tokens(2, 9)
    expected = {"prompt": prompt}
    for name, options in MODELS.items():
        model = tiny_model(**options)
        model.save_pretrained(directory / name)
        write_tokenizer(directory / name, model.config.vocab_size)
        generated = model.generate(prompt, max_new_tokens=NEW, do_sample=False, use_cache=False)
        with torch.no_grad():
            expected[name] = {"generated": generated, "logits": model(generated).logits}
    torch.save(expected, directory / "expected.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
