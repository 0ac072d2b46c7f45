"""What a run will need, before any GPU: its own training step, counted on the meta device.

One process stands for one rank of the layout: torch's fake process group gives it the true world
size, the meta device gives its tensors shapes and no storage, and Megatron's own training loop runs
a few steps on them. What is counted is what that code does: nothing here knows a formula for the
memory, the messages or the arithmetic of a transformer. `estimate.py` alone adds a model of time.

    dry_run    one rank's steps in a forked process      meta_device  what is replaced for it
    observe    the counters, on a dry or a real run      counting, traffic, memory
    plan       all stages of a layout, and the twin      search       layouts that fit
"""
