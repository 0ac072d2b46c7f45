# ruff: noqa: E402
"""One rank on a CPU: load a checkpoint of Megatron-Bridge into models that it fits, and others.

    python -m kvshift_megatron.cpu bridge_loads_worker.py OUTPUT

Writes OUTPUT/said.json: what each load said, or "loaded".
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# Bridge's training imports its data loaders, which are not installed and not used here.
sys.modules["megatron.energon"] = mock.MagicMock(name="megatron.energon")

import torch
import yaml
from megatron.bridge import AutoBridge
from megatron.bridge.training import checkpointing
from megatron.bridge.training.config import CheckpointConfig
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

import kvshift_megatron.bridge  # noqa: F401  (registers)
from kvshift_megatron.layer_specs import vanilla_layer_spec
from tests.support.single_process import gpt_model, transformer_config
from tests.transformer_engine.bridge_worker import Case, build, hugging_face_model, save_tokenizer


def main(output: Path) -> None:
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    bridge, free = made(output, "free")
    config = transformer_config()
    models = {
        "free": free,
        "clamp": made(output, "clamp", kv_shift_variant="clamp")[1],
        "keys": made(output, "keys", kv_shift_values=False)[1],
        "baseline": gpt_model(config, vanilla_layer_spec(config)),
    }
    saved = output / "checkpoint"
    bridge.save_megatron_model([free], saved)
    said = {}
    for name, model in models.items():
        said[f"{name}, weights"] = weights(saved, model)
        said[f"{name}, training"] = training(saved, model)
    change(saved, {"variant": "no such"})
    said["impossible"] = weights(saved, free)
    (output / "said.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


def made(output: Path, name: str, **fields) -> tuple[AutoBridge, torch.nn.Module]:
    case, folder = Case(fields, tp=1), output / name
    hugging_face_model(case).save_pretrained(folder)
    save_tokenizer(folder)
    bridge = AutoBridge.from_hf_pretrained(folder)
    return bridge, build(bridge, case)


def folder_of(saved: Path) -> Path:
    (found,) = saved.glob("iter_*")
    return found


def weights(saved: Path, model: torch.nn.Module) -> str:
    before = [parameter.clone() for parameter in model.parameters()]
    try:
        checkpointing._load_model_weights_from_checkpoint(str(folder_of(saved)), [model])
    except ValueError as error:
        assert all(map(torch.equal, before, model.parameters()))
        return str(error)
    return "loaded"


def training(saved: Path, model: torch.nn.Module) -> str:
    """Go as far as a run's start without a trainer: Bridge asks its state for more later."""
    checkpoint = CheckpointConfig(load=str(saved), ckpt_format="torch_dist")
    state = SimpleNamespace(cfg=SimpleNamespace(checkpoint=checkpoint))
    try:
        checkpointing._load_checkpoint_from_path(str(saved), state, [model], None, None)
    except ValueError as error:
        return str(error)
    except Exception as error:  # of the missing trainer
        return f"past the check: {error!r}"
    return "loaded"


def change(saved: Path, settings: dict) -> None:
    file = folder_of(saved) / "run_config.yaml"
    config = yaml.safe_load(file.read_text())
    config["model"]["transformer_layer_spec"]["kv_shift"] |= settings
    file.write_text(yaml.safe_dump(config))
    checkpointing.read_run_config.cache_clear()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
