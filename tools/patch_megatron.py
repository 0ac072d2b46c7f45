"""Apply this project's patches (`patches/`) to a Megatron-LM, check them, or revert them.

    python tools/patch_megatron.py apply|check|revert --megatron-path CHECKOUT

The same as kvshift-patch, for a checkout of this project that is not installed. CHECKOUT is the
folder that holds `megatron/`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvshift_megatron.megatron_lm.patch import main

if __name__ == "__main__":
    sys.exit(main())
