"""Convert checkpoints between Megatron's torch_dist and Hugging Face's safetensors.

`name_map` is the only table of names and serves both directions; `kvshift-convert` is the command
line. Importing this package imports neither Megatron nor Transformers.
"""
