"""Trains Megatron-LM's unmodified pretrain_gpt.py with KV shifting and compares the losses.

    python tools/check_stock_megatron.py --megatron-path CHECKOUT

What kvshift-check does, from a checkout that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvshift_megatron.megatron_lm.check import main

if __name__ == "__main__":
    sys.exit(main())
