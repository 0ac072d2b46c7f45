"""Apply the CPU layer's table, with three additions that are no rows.

These are a finder for Megatron's compiled helpers, a filter for one warning of Megatron's RNG
tracker, and Dynamo's list of functions, which is cleared when the layer is turned off.
"""

import logging
import sys

import torch

from kvshift_megatron.cpu import devices, megatron_hooks, stand_ins
from kvshift_megatron.upstream import cpu_table
from kvshift_megatron.upstream.dataset_helpers import HelperFinder
from kvshift_megatron.upstream.on_import import AppliedOnImport
from kvshift_megatron.upstream.substitutions import Substitution

_RNG_MODULE = "megatron.core.tensor_parallel.random"


def table() -> list[Substitution]:
    """Return the rows for this process."""
    visible = torch.cuda.is_available()
    return cpu_table.rows(devices, megatron_hooks, stand_ins, gpu_is_visible=visible)


class Layer(AppliedOnImport):
    """The substitutions of the CPU layer; `undo` reverts them all."""

    def __init__(self) -> None:
        super().__init__(table())
        self._helpers = HelperFinder()

    def apply(self) -> None:
        """Turn the layer on."""
        super().apply()
        sys.meta_path.insert(0, self._helpers)
        logging.getLogger(_RNG_MODULE).addFilter(megatron_hooks.cpu_rng_may_change)

    def undo(self) -> None:
        """Turn the layer off."""
        logging.getLogger(_RNG_MODULE).removeFilter(megatron_hooks.cpu_rng_may_change)
        sys.meta_path.remove(self._helpers)
        super().undo()
        trace_rules = sys.modules.get("torch._dynamo.trace_rules")
        if trace_rules is not None:
            # Dynamo knows functions by identity; torch.distributed clears this cache the same way.
            trace_rules.clear_lru_cache()
