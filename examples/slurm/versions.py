"""Print what a run uses: Python, the machine, and every installed distribution.

python -m examples.slurm.versions
"""

import platform
import shutil
import subprocess
import sys
from importlib import metadata


def main() -> int:
    """Print them and return the exit status."""
    print(f"python=={platform.python_version()}")
    print(f"platform=={platform.platform()}")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        for line in sorted(set(answer.splitlines())):
            print(f"gpu, driver=={line}")
    found = {dist.name: dist.version for dist in metadata.distributions() if dist.name}
    for name in sorted(found, key=str.lower):
        print(f"{name}=={found[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
