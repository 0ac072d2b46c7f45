"""Read a training log of Megatron: validation lines and the parameter count."""

import re
from dataclasses import dataclass, field

LOSS, ACCURACY = "lm loss", "induction accuracy"

# " validation loss at iteration 50 on test set | lm loss value: 6.2E+00 | lm loss PPL: ... | "
_VALIDATION = re.compile(r"validation loss at iteration (\d+)(?: on (validation|test) set)? \|(.*)")
_VALUE = re.compile(r"\s*(.+?) value: (\S+)\s*")
# " > number of parameters on (tensor, ...) model parallel rank (0, 0, 0): 123"
_PARAMETERS = re.compile(r"number of parameters on .*model parallel rank \([\d, ]+\): (\d+)")


@dataclass(frozen=True)
class Evaluation:
    """One validation: training step, mean loss in nats per token, accuracy at the first repeat."""

    step: int
    loss: float
    accuracy: float


@dataclass
class TrainingLog:
    """Takes a log line by line and keeps what the report needs."""

    evaluations: list[Evaluation] = field(default_factory=list)
    test: Evaluation | None = None
    parameters_per_rank: int | None = None

    def feed(self, line: str) -> Evaluation | None:
        """Take one line; return the point that it adds to the validation curve, if any.

        Megatron validates once more after the last step, on further samples. That is a new point
        only if the last step was not a multiple of --eval-interval.

        Raises:
            ValueError: A validation line lacks the loss or the accuracy.
        """
        if match := _PARAMETERS.search(line):
            self.parameters_per_rank = max(self.parameters_per_rank or 0, int(match[1]))
            return None
        match = _VALIDATION.search(line)
        if match is None:
            return None
        step, where, rest = int(match[1]), match[2], match[3]
        values = {m[1]: float(m[2]) for part in rest.split("|") if (m := _VALUE.fullmatch(part))}
        missing = {LOSS, ACCURACY} - values.keys()
        if missing:
            raise ValueError(f"validation line at step {step} lacks {', '.join(sorted(missing))}")
        evaluation = Evaluation(step, values[LOSS], values[ACCURACY])
        if where == "test":
            self.test = evaluation
            return None
        if self.evaluations and self.evaluations[-1].step == step:
            return None
        self.evaluations.append(evaluation)
        return evaluation
