"""Place ranks in a layout, and choose which ranks and how many micro-batches to count."""

from argparse import Namespace
from dataclasses import dataclass

from kvshift_megatron.recipes import patterns


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Ranks count TP fastest, then CP, then DP, then PP.

    Attributes:
        interleaved: Whether a pipeline stage holds several model chunks.
        micro_batches: Micro-batches per rank and step.
    """

    tp: int
    cp: int
    dp: int
    pp: int
    interleaved: bool
    micro_batches: int

    @classmethod
    def of(cls, args: Namespace, world_size: int) -> "Layout":
        """Make the layout of parsed arguments, which need not be validated.

        Raises:
            ValueError: The layout does not divide the ranks or the batch.
        """
        tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
        pp = args.pipeline_model_parallel_size
        if world_size % (tp * cp * pp):
            raise ValueError(
                f"{world_size} processes are not divisible by TP {tp} x CP {cp} x PP {pp}: change "
                "--nproc or the layout"
            )
        dp = world_size // (tp * cp * pp)
        if args.global_batch_size % (args.micro_batch_size * dp):
            raise ValueError(
                f"global-batch-size is {args.global_batch_size}: it must be divisible by "
                f"micro-batch-size x DP = {args.micro_batch_size * dp}"
            )
        return cls(
            tp,
            cp,
            dp,
            pp,
            pp > 1
            and any(
                (
                    args.num_layers_per_virtual_pipeline_stage,
                    args.num_virtual_stages_per_pipeline_rank,
                    args.pipeline_model_parallel_layout,
                    patterns.stages(args.hybrid_layer_pattern or "") > pp,
                )
            ),
            args.global_batch_size // (args.micro_batch_size * dp),
        )

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    def rank(self, stage: int, dp: int = 0, cp: int = 0, tp: int = 0) -> int:
        """Return the global rank at this place in each group."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * stage))

    def probes(self, stage: int) -> dict[str, int]:
        """Return the ranks of a stage that could differ from its first one, by name.

        They are the ends of every axis, and the first context-parallel rank with two neighbours. At
        the ends such a rank has one neighbour, and part of what the last data-parallel rank has of
        the optimizer may be padding.
        """
        found = {}
        if self.tp > 1:
            found[f"TP {self.tp - 1}"] = self.rank(stage, tp=self.tp - 1)
        if self.dp > 1:
            found[f"DP {self.dp - 1}"] = self.rank(stage, dp=self.dp - 1)
        for cp in {1, self.cp - 1} - {0}:
            if cp < self.cp:
                found[f"CP {cp}"] = self.rank(stage, cp=cp)
        return found

    def warm_up(self) -> int:
        """Return the micro-batches of the first step, which only creates the optimizer's state."""
        return min(self.micro_batches, self.pp if self.interleaved else 1)

    def counted_steps(self, stage: int) -> tuple[int, ...]:
        """Return the micro-batches of the steps to count: of the real step, or of two short ones.

        Once the pipeline of this stage is full, a step's cost is linear in its micro-batches, so
        two short steps give the cost of a long one.
        """
        if self.interleaved:
            first, unit = 2 * self.pp, self.pp
        else:
            first, unit = self.pp - stage + 1, 1
        if self.micro_batches <= first + unit:
            return (self.micro_batches,)
        return (first, first + unit)

    def describe(self) -> str:
        """Return it in words, such as TP 4 x CP 1 x PP 1 x DP 60."""
        return f"TP {self.tp} x CP {self.cp} x PP {self.pp} x DP {self.dp}"
