"""Print what a configuration needs of a cluster, before there is one.

    python tools/plan_cluster.py MODEL LAYOUT [--nproc N] [--set FLAG[=VALUE]] [--gpu NAME]

The same as kvshift-plan, for a checkout of this project that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvshift_megatron.planning.command_line import main

if __name__ == "__main__":
    sys.exit(main())
