"""Applies the patches of this repository (`patches/`) to a Megatron-LM, or takes them back.

    python tools/patch_megatron.py apply|check|revert --megatron-path CHECKOUT

What kvshift-patch does, from a checkout that is not installed. CHECKOUT is the folder that holds
`megatron/`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvshift_megatron.megatron_lm.patch import main

if __name__ == "__main__":
    sys.exit(main())
