"""The shift without Megatron: keys and values in, shifted (and rotated) keys and values out."""

from kvshift_megatron.ops.api import kv_shift, kv_shift_rope
from kvshift_megatron.ops.reference import shift_ref, shift_wide

__all__ = ["kv_shift", "kv_shift_rope", "shift_ref", "shift_wide"]
