"""The fixtures of the unit tests."""

from tests.unit.conftest import _process_group, megatron_rank  # noqa: F401
