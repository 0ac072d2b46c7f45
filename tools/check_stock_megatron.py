"""Train Megatron-LM's unmodified pretrain_gpt.py with KV shifting and compare the losses.

    python tools/check_stock_megatron.py --megatron-path CHECKOUT

The same as kvshift-check, for a checkout of this project that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvshift_megatron.megatron_lm.check import main

if __name__ == "__main__":
    sys.exit(main())
