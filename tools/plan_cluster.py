"""What a configuration needs of a cluster, before there is one.

    python tools/plan_cluster.py MODEL LAYOUT [--nproc N] [--set FLAG[=VALUE]] [--gpu NAME]

What kvshift-plan does, from a checkout that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvshift_megatron.planning.command_line import main

if __name__ == "__main__":
    sys.exit(main())
