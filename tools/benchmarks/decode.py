"""Measure decoding with the exported Transformers model against Llama of the same shape."""

import time

import torch

from tools.benchmarks import timing
from tools.benchmarks.correctness import WrongResult
from tools.benchmarks.settings import ReportProgress, Settings, part

SHAPE = {
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
}
_QUICK_SHAPE = SHAPE | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
BATCHES = (1, 8)
_PROMPT = 128  # tokens


def measure(settings: Settings, progress: ReportProgress) -> dict:
    """Measure every batch size.

    Returns:
        {"cases": [{"batch", "runs": {"llama" | "kv_shift": {"tokens_per_second", "ratio"}}}], ...}.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    progress(0.0, "building the models")
    models = build_models(_QUICK_SHAPE if settings.quick else SHAPE, settings.folder)
    models = {name: model.to(device) for name, model in models.items()}
    _refuse_wrong_cache(models["kv_shift"], device)
    tokens, rounds = (4, 3) if settings.quick else (16, 20)
    cases = []
    for i, batch in enumerate(BATCHES):
        done = part(progress, i / len(BATCHES), (i + 1) / len(BATCHES))
        cases.append(_measure_batch(models, batch, tokens, rounds, device, done))
    shape = _QUICK_SHAPE if settings.quick else SHAPE
    return {"device": device, "dtype": "fp32", "model": shape, "prompt": _PROMPT, "cases": cases}


def build_models(shape: dict, folder) -> dict[str, torch.nn.Module]:
    """Return Llama, and this package's model from an exported folder, with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from kvshift_megatron.hf import KVShiftLlamaConfig, KVShiftLlamaForCausalLM

    torch.manual_seed(1)
    exported = folder / "exported"
    KVShiftLlamaForCausalLM(KVShiftLlamaConfig(**shape)).save_pretrained(exported)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**shape)).eval(),
        "kv_shift": AutoModelForCausalLM.from_pretrained(exported).eval(),
    }


@torch.inference_mode()
def _refuse_wrong_cache(model: torch.nn.Module, device: str) -> None:
    """Raise WrongResult if decoding from a cache gives other logits than a whole forward pass."""
    tokens = torch.randint(model.config.vocab_size, (2, 24), device=device)
    whole = model(tokens).logits[:, -1]
    cache = model(tokens[:, :-1], use_cache=True).past_key_values
    step = model(tokens[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    error = float((step - whole).norm() / whole.norm())
    if not error <= 1e-4:
        raise WrongResult(f"decoding differs from the forward pass by {error:.1e}")


class Decoder:
    """Greedy decoding from a prompt on, one token per step."""

    def __init__(self, model: torch.nn.Module, batch: int, device: str):
        prompt = torch.randint(model.config.vocab_size, (batch, _PROMPT), device=device)
        self._model = model
        self._step(prompt, None)

    @torch.inference_mode()
    def _step(self, tokens, cache) -> None:
        output = self._model(tokens, past_key_values=cache, use_cache=True)
        self._cache = output.past_key_values
        self._next = output.logits[:, -1:].argmax(dim=-1)

    def window(self, tokens: int) -> float:
        """Return the seconds for that many further tokens of every sequence."""
        start = time.perf_counter()
        for _ in range(tokens):
            self._step(self._next, self._cache)
        self._next.tolist()  # waits for a GPU
        return time.perf_counter() - start


def _measure_batch(models, batch: int, tokens: int, rounds: int, device: str, progress) -> dict:
    decoders = {name: Decoder(model, batch, device) for name, model in models.items()}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for decoder in decoders.values():
        decoder.window(2)
    for number in range(rounds):
        progress(number / rounds, f"batch {batch}, window {number + 1} of {rounds}")
        names = list(decoders)
        for name in names if number % 2 == 0 else names[::-1]:
            speeds[name].append(batch * tokens / decoders[name].window(tokens))
    runs = {}
    for name, values in speeds.items():
        ratios = [own / llama for own, llama in zip(values, speeds["llama"])]
        runs[name] = {
            "tokens_per_second": timing.spread(values),
            "ratio": timing.spread(ratios),
        }
    return {"batch": batch, "tokens_a_window": tokens, "runs": runs}
