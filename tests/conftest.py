"""The suite compares numbers on the CPU, also on a machine that has a GPU."""

import os

# Before anything imports torch, and inherited by every process that a test starts.
os.environ["KVSHIFT_CPU"] = "1"
