"""Import this to make Megatron's mock data a fiftieth as large.

With short sequences it is millions of samples, whose shuffling takes longer than a few steps. Runs
whose losses are compared need the same size.
"""

from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

MockGPTLowLevelDataset.size = 2000
