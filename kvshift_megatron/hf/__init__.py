"""The Transformers model. It does not need Megatron.

Importing this package registers it with AutoConfig, AutoModel, AutoModelForCausalLM,
AutoModelForSequenceClassification and AutoModelForTokenClassification.
"""

import shutil
from functools import partial
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from kvshift_megatron.hf.configuration_kvshift import AUTO_MAP, KVShiftLlamaConfig
from kvshift_megatron.hf.modeling_kvshift import (
    KVShiftLlamaForCausalLM,
    KVShiftLlamaForSequenceClassification,
    KVShiftLlamaForTokenClassification,
    KVShiftLlamaModel,
    KVShiftLlamaPreTrainedModel,
)
from kvshift_megatron.utils import atomic_files
from kvshift_megatron.utils.output_paths import check_outputs

__all__ = [
    "AUTO_MAP",
    "KVShiftLlamaConfig",
    "KVShiftLlamaForCausalLM",
    "KVShiftLlamaForSequenceClassification",
    "KVShiftLlamaForTokenClassification",
    "KVShiftLlamaModel",
    "KVShiftLlamaPreTrainedModel",
    "write_code",
]


def write_code(folder: str | Path) -> list[Path]:
    """Copy the model's source into an exported folder, as `save_pretrained` does.

    With `AUTO_MAP` in its config.json, the folder then loads with ``trust_remote_code=True`` and
    without this package.

    Returns:
        The files written.

    Raises:
        ValueError: The folder is this package's own; nothing is written.
    """
    sources = sorted(Path(__file__).parent.glob("*_kvshift.py"))
    written = [Path(folder) / path.name for path in sources]
    check_outputs(written, [Path(__file__).parent])
    for path, copy in zip(sources, written):
        atomic_files.replace(copy, partial(shutil.copyfile, path))
    return written


AutoConfig.register(KVShiftLlamaConfig.model_type, KVShiftLlamaConfig)
AutoModel.register(KVShiftLlamaConfig, KVShiftLlamaModel)
AutoModelForCausalLM.register(KVShiftLlamaConfig, KVShiftLlamaForCausalLM)
AutoModelForSequenceClassification.register(
    KVShiftLlamaConfig, KVShiftLlamaForSequenceClassification
)
AutoModelForTokenClassification.register(KVShiftLlamaConfig, KVShiftLlamaForTokenClassification)

# Makes save_pretrained write the source and the auto_map, too.
KVShiftLlamaConfig.register_for_auto_class()
KVShiftLlamaModel.register_for_auto_class("AutoModel")
KVShiftLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
KVShiftLlamaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
KVShiftLlamaForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
