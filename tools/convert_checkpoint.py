"""Convert a checkpoint between Megatron's torch_dist and Hugging Face's safetensors.

    python tools/convert_checkpoint.py megatron-to-hf CHECKPOINT FOLDER
    python tools/convert_checkpoint.py hf-to-megatron FOLDER CHECKPOINT

Run kvshift-convert from a checkout that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvshift_megatron.convert.command_line import main

if __name__ == "__main__":
    sys.exit(main())
