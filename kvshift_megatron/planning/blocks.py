"""A model's layers as equal blocks, of which each pipeline stage gets the same number."""

from argparse import Namespace
from dataclasses import dataclass

from kvshift_megatron.recipes import patterns
from kvshift_megatron.recipes.toml_flags import Flags


@dataclass(frozen=True)
class Blocks:
    """The layers of a model.

    Attributes:
        count: How many blocks there are.
        unit: Layers of a block in a hybrid model, such as `*-`; empty for a layer of a GPT model.
        mtp: What the pattern says of multi-token prediction, from the first `/` on.
    """

    count: int
    unit: str = ""
    mtp: str = ""

    @classmethod
    def of(cls, args: Namespace) -> "Blocks":
        """Return the blocks that parsed arguments ask for; their stages are ignored.

        A hybrid layer pattern is divided into what it repeats. If it repeats nothing, it is one
        block, which no pipeline can divide.
        """
        pattern = args.hybrid_layer_pattern
        if pattern is None:
            return cls(args.num_layers)
        unit = patterns.unit(pattern)
        _, slash, mtp = pattern.partition(patterns.MTP)
        return cls(len(patterns.main_layers(pattern)) // len(unit), unit, slash + mtp)

    def flags(self, count: int, stages: int = 1, chunks: int = 1) -> Flags:
        """Return the flags of a model of `count` blocks.

        Args:
            count: Divisible by the model chunks.
            stages: Pipeline stages.
            chunks: Model chunks per pipeline stage.
        """
        if self.unit:
            pattern = patterns.repeated(self.unit, count, stages * chunks)
            return {"hybrid-layer-pattern": pattern + self.mtp}
        per_chunk = {"num-layers-per-virtual-pipeline-stage": count // stages // chunks}
        return {"num-layers": count} | (per_chunk if chunks > 1 else {})

    def recomputed(self, flags: Flags) -> Flags:
        """Return recompute flags in which a block is recomputed as one, as a GPT layer is."""
        if "recompute-num-layers" not in flags or self.count == 1 or not self.unit:
            return flags
        return flags | {"recompute-num-layers": len(self.unit) * flags["recompute-num-layers"]}
