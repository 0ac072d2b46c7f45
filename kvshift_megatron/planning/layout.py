"""Where a rank stands in a layout, which ranks differ, and how many micro-batches show a step."""

from argparse import Namespace
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; ranks count TP fastest, then CP, then data, then pipeline.

    Attributes:
        interleaved: whether a pipeline stage holds several model chunks.
        micro_batches: of each rank and step.
    """

    tp: int
    cp: int
    dp: int
    pp: int
    interleaved: bool
    micro_batches: int

    @classmethod
    def of(cls, args: Namespace, world_size: int) -> "Layout":
        """From parsed, unvalidated arguments.

        Raises:
            ValueError: the layout does not divide the ranks or the batch.
        """
        tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
        pp = args.pipeline_model_parallel_size
        if world_size % (tp * cp * pp):
            raise ValueError(
                f"{world_size} processes are not divided by TP {tp} x CP {cp} x PP {pp}: change "
                "--nproc or the layout"
            )
        dp = world_size // (tp * cp * pp)
        if args.global_batch_size % (args.micro_batch_size * dp):
            raise ValueError(
                f"global-batch-size is {args.global_batch_size}, which micro-batch-size x DP = "
                f"{args.micro_batch_size * dp} must divide"
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
                )
            ),
            args.global_batch_size // (args.micro_batch_size * dp),
        )

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    def rank(self, stage: int, dp: int = 0, cp: int = 0, tp: int = 0) -> int:
        """The global rank at these places."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * stage))

    def probes(self, stage: int) -> dict[str, int]:
        """Ranks of a stage that could differ from its first one, by what they are called.

        The ends of every axis: a context-parallel rank has one neighbour at the ends and two
        between, and the last data-parallel rank's part of the optimizer may be padding.
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
        """Micro-batches of the first step, which only gives the optimizer its state."""
        return min(self.micro_batches, self.pp if self.interleaved else 1)

    def counted_steps(self, stage: int) -> tuple[int, ...]:
        """Micro-batches of the steps that are counted: one that is the real step, or two.

        What a step costs is linear in its micro-batches once the pipeline of this stage is full, so
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
        """TP 4 x CP 1 x PP 1 x DP 60."""
        return f"TP {self.tp} x CP {self.cp} x PP {self.pp} x DP {self.dp}"
