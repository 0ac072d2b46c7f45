"""Print the words of a file of flags, each followed by a null byte, for bash's mapfile.

python -m examples.slurm.flags FILE
"""

import sys
from pathlib import Path

from kvshift_megatron.utils.flag_lines import to_words


def main(argv: list[str]) -> int:
    """Run the command line and return the exit status."""
    for line in Path(argv[0]).read_text().splitlines():
        for word in to_words(line):
            sys.stdout.write(f"{word}\0")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
