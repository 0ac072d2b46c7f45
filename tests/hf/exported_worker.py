"""Use exported folders as a user who has Transformers but not this package.

    python exported_worker.py DIRECTORY

Prints one line for each thing it has tried; test_exported_folder.py counts them.
"""

import sys
from pathlib import Path

import torch


class Blocked:
    """An import hook that refuses this package and Megatron."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("kvshift_megatron", "megatron"):
            raise ImportError(f"{name} is not installed here")


def near(actual, expected, tolerance=1e-5):
    return (actual - expected).abs().max() <= tolerance * expected.abs().max()


def use(folder: Path, prompt: torch.Tensor, expected: dict) -> None:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DynamicCache,
        StaticCache,
        pipeline,
    )

    def tried(what: str, right) -> None:
        assert right, f"{folder.name}: {what}"
        print(f"{folder.name}: {what}", flush=True)

    remote = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **remote)
    tried("AutoConfig", config.model_type == "kvshift_llama")
    model = AutoModelForCausalLM.from_pretrained(folder, **remote).eval()
    tried("its own code", type(model).__module__.startswith("transformers_modules."))
    everything, logits = expected["generated"], expected["logits"]
    greedy = {"max_new_tokens": everything.shape[1] - prompt.shape[1], "do_sample": False}

    def generates(**kwargs):
        return torch.equal(model.generate(prompt, **greedy, **kwargs), everything)

    tried("generate", generates())
    tried("generate without a cache", generates(use_cache=False))
    tried("generate with a static cache", generates(cache_implementation="static"))
    with torch.no_grad():
        tried("logits", near(model(everything).logits, logits))
        base = AutoModel.from_pretrained(folder, **remote).eval()
        states = base(everything).last_hidden_state
        tried("AutoModel", near(model.lm_head(states), logits))
        scores = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **remote)
        score = scores.eval().score(states[:1, -1])
        tried("sequence classification", near(scores(everything[:1]).logits, score))
        for cache in (
            DynamicCache(),
            DynamicCache(config=model.config),
            StaticCache(config=model.config, max_cache_len=32),
        ):
            steps = [
                model(everything[:, i : i + 3], past_key_values=cache).logits
                for i in range(0, everything.shape[1], 3)
            ]
            tried(f"steps in a {type(cache).__name__}", near(torch.cat(steps, 1), logits))
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        tried("torch.compile", near(compiled(everything, use_cache=False).logits, logits))

    tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
    text = " ".join(map(str, prompt[0].tolist()))
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = pipe(text, return_full_text=False, **greedy)[0]["generated_text"]
    tried("pipeline", said.split() == [str(i) for i in everything[0, prompt.shape[1] :].tolist()])

    gradients = []
    for checkpointing in (False, True):
        model.train()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(everything, labels=everything).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    tried("gradient checkpointing", all(map(near, *gradients)))
    model.gradient_checkpointing_disable()

    again = folder.with_name(f"{folder.name} again")
    model.eval().save_pretrained(again)
    model = AutoModelForCausalLM.from_pretrained(again, **remote).eval()
    tried("save_pretrained", generates())
    code = sorted(path.name for path in folder.glob("*.py"))
    tried("the saved code", code == sorted(path.name for path in again.glob("*.py")))


def main(directory: str) -> int:
    torch.set_num_threads(1)
    sys.meta_path.insert(0, Blocked())
    expected = torch.load(Path(directory) / "expected.pt", weights_only=True)
    prompt = expected.pop("prompt")
    for name, values in expected.items():
        use(Path(directory) / name, prompt, values)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
