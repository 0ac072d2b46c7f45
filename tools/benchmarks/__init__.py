"""Benchmarks that anyone can run: `make bench`, or `python -m tools.benchmarks`.

Each section is a module with `measure(settings, progress) -> dict` and runs in a process of its
own (`sections`): what one sets (the allocator, Megatron's global state) does not affect another,
and if one fails, the others' figures are kept.
"""
