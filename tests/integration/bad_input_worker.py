"""One rank: run pretrain.main() with bad command lines and store how each of them ended.

torchrun ... -m tests.integration.bad_input_worker OUTPUT_DIR
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from kvshift_megatron import pretrain
from tests.integration.bad_input import BAD_INPUT


def main(output: Path) -> None:
    endings = {}
    for name, (command, _) in BAD_INPUT.items():
        sys.argv[1:] = command
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                pretrain.main()
            endings[name] = "ended without an error"
        except SystemExit as error:
            endings[name] = error.code
    (output / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(endings))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
