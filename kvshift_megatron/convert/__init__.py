"""Checkpoints of this architecture: Megatron's torch_dist to Hugging Face's safetensors and back.

`name_map` is the one table of names, used in both directions; `kvshift-convert` is the command
line. Importing this package imports neither Megatron nor Transformers.
"""
