"""What a configuration needs of a cluster, before there is one.

    python tools/plan_cluster.py MODEL LAYOUT [--nproc N] [--set FLAG[=VALUE]] [--gpu NAME]

MODEL and LAYOUT are those of kvshift_megatron/recipes. Builds the real model for every pipeline
stage on the meta device, runs Megatron's own training step there, and prints what was counted:
memory, messages, FLOPs; and an estimate of the step's time. Needs no GPU. Exit status: 0 it fits,
1 it does not, 2 for a mistake. `--help` has the rest.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvshift_megatron.planning.command_line import main

if __name__ == "__main__":
    sys.exit(main())
