"""The shift itself, without Megatron: key and value in, shifted key and value out."""

from kvshift_megatron.ops.api import kv_shift
from kvshift_megatron.ops.reference import shift_ref, shift_wide

__all__ = ["kv_shift", "shift_ref", "shift_wide"]
