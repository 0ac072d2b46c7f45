"""Generate from a converted folder, after a random prompt and a repetition of its beginning.

    python examples/hugging_face/generate.py FOLDER

A model that has learnt induction goes on with what followed before. The folder contains the model's
code (trust_remote_code), so this needs Transformers but not this package.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

PROMPT, AGAIN, NEW = 24, 8, 8  # tokens


def main(folder: str) -> int:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    once = torch.randperm(model.config.vocab_size, generator=torch.manual_seed(1))[:PROMPT]
    prompt = torch.cat((once, once[:AGAIN]))
    expected = once[AGAIN : AGAIN + NEW]
    output = model.generate(prompt[None], max_new_tokens=NEW, do_sample=False)
    generated = output[0, prompt.numel() :]
    print("prompt:    ", *prompt.tolist())
    print("generated: ", *generated.tolist())
    print("repetition:", *expected.tolist())
    print(f"{(generated == expected).sum()} of {NEW} tokens repeat what came before")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
