"""Measure writing tokens as Megatron's indexed dataset, the last step of its preprocessing."""

import time
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from tools.benchmarks.correctness import WrongResult

_VOCABULARY = 48_000
_LENGTHS = (200, 2000)  # tokens per document, from and below


def tokens_per_second(folder: Path, documents: int) -> float:
    """Write documents of random tokens from memory to a dataset in the page cache.

    Raises:
        WrongResult: The dataset does not hold what was written.
    """
    generator = np.random.default_rng(0)
    dtype = DType.optimal_dtype(_VOCABULARY)
    lengths = generator.integers(*_LENGTHS, size=documents)
    written = [generator.integers(_VOCABULARY, size=n).astype(dtype) for n in lengths]
    prefix = folder / "dataset"
    start = time.perf_counter()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens in written:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    seconds = time.perf_counter() - start
    read = IndexedDataset(str(prefix))
    if len(read) != documents or any(not np.array_equal(read[i], x) for i, x in enumerate(written)):
        raise WrongResult("an indexed dataset does not hold the tokens that were written to it")
    return float(lengths.sum()) / seconds
