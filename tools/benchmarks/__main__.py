"""Measure what KV shifting costs on this machine.

    python -m tools.benchmarks [--quick] [--only operation,step,...] [--output DIRECTORY]

Measured are the operation (against other ways to write it and against a plain copy), the training
step (against the baseline model's), decoding, scaling and conversion. The command prints Markdown
tables and writes JSON and a picture. Each implementation is first compared with the definition in
float64; a wrong one is refused, and the exit code is 1. About 10 minutes on 2 cores.
"""

import sys

from tools.benchmarks.command_line import main

if __name__ == "__main__":
    sys.exit(main())
