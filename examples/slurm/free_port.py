"""Print a TCP port of this host that nobody listens on.

python -m examples.slurm.free_port
"""

import random
import socket
import sys
from pathlib import Path

_LOWEST = 15000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Return a free port below the ephemeral ports.

    The system could give an ephemeral port to any connection of this host before it is used here.

    Raises:
        OSError: There is none.
    """
    end = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 32768
    ports = range(_LOWEST, end) if end > _LOWEST + 1000 else range(_LOWEST, 65536)
    for port in random.sample(ports, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 100 ports between {ports.start} and {ports.stop - 1} is free")


if __name__ == "__main__":
    print(free_port())
    sys.exit(0)
