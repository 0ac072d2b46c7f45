"""Numerical tolerances of the test suite, with their reasons."""

# Norm-wise relative error ||a - b|| / ||b||: layouts sum the same fp32 products in other orders.
FP32_REL = 1e-5

# bf16: how many spreads a layout may be away from the single process. The spread is measured in the
# same run: the largest distance between any two of 13 single-process runs that differ only in the
# order of summation (what TP sums over ranks is summed in 1, 2, 4 or 8 rounded parts, at
# micro-batches of 1, 2 or 4).
BF16_SPREADS = 1.0
