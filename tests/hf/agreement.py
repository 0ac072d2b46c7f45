"""The tolerances of the Transformers model's tests, with their reasons."""

# Largest error over the largest logit. fp32 sums in another order (other shapes, another kernel)
# differ by some 1e-7 a layer; the errors planted in these tests differ by 1e-2 and more.
LOGITS = 1e-5

# The same in float64, where nothing is rounded to fp32 on the way (attention alone).
FLOAT64 = 1e-12
