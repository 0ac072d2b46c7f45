"""Tell what a run will need before there is a GPU: count its training step on the meta device.

One process stands for one rank of the layout: torch's fake process group gives it the true world
size, the meta device gives its tensors shapes without storage, and Megatron's own training loop
runs a few steps on them. The counts are of what that code does: no formula here knows the memory,
the messages or the arithmetic of a transformer. Only `estimate.py` adds a model, of time.

    dry_run    one rank's steps in a forked process      meta_device  what is replaced for it
    observe    the counters, on a dry or a real run      counting, traffic, memory
    plan       all stages, and the baseline model's      search       layouts that fit
"""
