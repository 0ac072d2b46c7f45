"""A tiny tokenizer and conversations for Megatron's SFT dataset."""

import json
import random
from pathlib import Path

_WORDS = [f"w{i}" for i in range(100)]
_SPECIAL = ["<unk>", "<pad>", "<eos>", "system", "user", "assistant"]
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} <eos> {% endfor %}"
)


def write(directory: Path, lines: int = 64, seed: int = 0) -> tuple[Path, Path]:
    """Write a tokenizer folder and a jsonl file; every line packs three short conversations."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(_SPECIAL + _WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(directory / "tokenizer")

    words = random.Random(seed)
    data = directory / "conversations.jsonl"
    with open(data, "w") as file:
        for _ in range(lines):
            messages = []
            for _ in range(3):
                for role in ("system", "user", "assistant"):
                    content = " ".join(words.choices(_WORDS, k=words.randint(1, 5)))
                    messages.append({"role": role, "content": content})
            file.write(json.dumps({"messages": messages}) + "\n")
    return directory / "tokenizer", data
