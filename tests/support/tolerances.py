"""Every numerical tolerance of the test suite, with its reason."""

# Norm-wise relative error ||a - b|| / ||b||. Layouts sum the same fp32 products in another order.
FP32_REL = 1e-5

# bf16: how many spreads a layout may be away from the single process. The spread is measured in the
# same run: the largest distance between any two of 13 single-process runs that differ in summation
# order only (what TP would sum over ranks is summed in 1, 2, 4 or 8 rounded parts, at micro-batches
# of 1, 2 or 4).
BF16_SPREADS = 1.0
