"""Convert a checkpoint between Megatron's torch_dist and Hugging Face's safetensors.

    python tools/convert_checkpoint.py megatron-to-hf CHECKPOINT FOLDER
    python tools/convert_checkpoint.py hf-to-megatron FOLDER CHECKPOINT

On a CPU, in one process, one tensor in memory at a time, whatever parallel layout saved the
checkpoint. The output appears under its name only when it is complete. Exit code 1 and one sentence
on standard error where something cannot be converted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvshift_megatron.checkpoint.command_line import main

if __name__ == "__main__":
    sys.exit(main())
