"""Tolerances of the Transformers model's tests, with their reasons."""

# Largest error relative to the largest logit. fp32 sums in another order (other shapes, another
# kernel) differ by some 1e-7 per layer; the errors planted in these tests differ by 1e-2 and more.
LOGITS = 1e-5

# The same for attention alone in float64, if nothing is rounded to fp32 in between.
FLOAT64 = 1e-12
