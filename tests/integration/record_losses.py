"""Run kvshift_megatron.pretrain and store every micro-batch's exact loss.

torchrun ... record_losses.py OUTPUT.json <flags of kvshift_megatron.pretrain>
"""

import json
import os
import sys
from pathlib import Path

from kvshift_megatron import pretrain


def main() -> None:
    output = Path(sys.argv.pop(1))
    losses = []

    def recording(loss_mask, metrics, token_losses):
        result = original(loss_mask, metrics, token_losses)
        losses.append(float(result[0].detach()).hex())
        return result

    from kvshift_megatron import cpu

    cpu.enable()
    import tests.support.small_mock_data  # noqa: F401
    from kvshift_megatron.training import forward_step

    original, forward_step.masked_loss = forward_step.masked_loss, recording
    try:
        pretrain.main()
    finally:
        # Also after sys.exit, with which Megatron ends a run at --exit-interval.
        if os.environ["RANK"] == "0":
            output.write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
