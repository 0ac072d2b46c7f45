"""A minimal pretrain_gpt.py of Megatron-LM (core_v0.19), which megatron-core's wheel lacks.

Parsing, `--spec`, the model's builder and the loop are Megatron's; only the tokens are made here.
"""

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


class Tokens(torch.utils.data.Dataset):
    """Samples of random tokens, int64 [seq_length + 1]."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        args = get_args()
        generator = torch.Generator().manual_seed(index)
        return torch.randint(args.vocab_size, (args.seq_length + 1,), generator=generator)


def datasets(sizes, vp_stage=None):
    return Tokens(), None, None


def forward_step(iterator, model):
    tokens = next(iterator)
    positions = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
    losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())

    def total(losses):
        loss, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int)
        return loss, count, {"lm loss": torch.stack([loss.detach(), count.float()])}

    return losses, total


if __name__ == "__main__":
    args = parse_and_validate_args()
    config = gpt_config_from_args(args)
    container = pretrain_cfg_container_from_args(args, config)
    pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step)
