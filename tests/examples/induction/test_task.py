"""The induction task: its datasets from Megatron's builder, and its metric over split logits."""

import argparse
import threading
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer
from megatron.training import global_vars

from examples.induction import task
from examples.induction.data import generate

SEQ, VOCAB = 24, 32


@pytest.fixture
def splits(monkeypatch):
    """Return (train, valid, test) of 40, 30 and 20 samples."""
    args = SimpleNamespace(
        seed=5,
        induction_seed=None,
        seq_length=SEQ,
        create_attention_mask_in_dataloader=True,
    )
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    monkeypatch.setattr(global_vars, "_GLOBAL_TOKENIZER", NullTokenizer(VOCAB))
    return task.train_valid_test_datasets_provider([40, 30, 20])


def test_a_sample_has_the_entries_of_gpt_dataset(splits):
    assert [len(split) for split in splits] == [40, 30, 20]
    item = splits[0][7]
    expected = torch.from_numpy(generate(5, 7, 1, SEQ, VOCAB)[0])
    assert torch.equal(item["tokens"], expected[:-1])
    assert torch.equal(item["labels"], expected[1:])
    assert torch.equal(item["position_ids"], torch.arange(SEQ))
    mask = item.pop("attention_mask")  # True where attention is forbidden
    assert torch.equal(mask, torch.ones(1, SEQ, SEQ, dtype=torch.bool).triu(1))
    dtypes = {key: value.dtype for key, value in item.items()}
    assert dtypes == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "loss_mask": torch.float32,
        "induction_mask": torch.float32,
    }
    assert all(value.shape == (SEQ,) for value in item.values())
    (scored,) = item["induction_mask"].nonzero().flatten().tolist()
    assert item["tokens"][scored] in item["tokens"][:scored]


def test_splits_do_not_share_sequences(splits):
    rows = [tuple(item["tokens"].tolist()) for split in splits for item in split_items(split)]
    assert len(set(rows)) == len(rows) == 90


def split_items(split):
    return [split[i] for i in range(len(split))]


def test_samples_outlive_their_block(splits):
    first = splits[0][0]["tokens"]
    kept = first.clone()
    splits[0]._sequences[10_000]
    assert torch.equal(first, kept)


def test_the_seed_flag_is_parsed():
    parser = task.add_args(argparse.ArgumentParser())
    assert parser.parse_args([]).induction_seed is None
    assert parser.parse_args(["--induction-seed", "3"]).induction_seed == 3


def test_the_metric_counts_scored_positions():
    labels = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 0, 1]])
    mask = torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 0, 0]])
    logits = torch.nn.functional.one_hot(labels, 8).float()
    logits[1, 2] = logits[1, 1]  # a wrong prediction
    counted = task.validation_metrics(logits, {"labels": labels, "induction_mask": mask})
    assert counted.keys() == {"induction accuracy"}
    assert torch.equal(counted["induction accuracy"], torch.tensor([1.0, 2.0]))


def test_argmax_over_split_vocabulary(monkeypatch):
    """Two threads stand for two ranks; ties within and across ranks go to the lowest index."""
    size, barrier, slots = 2, threading.Barrier(2, timeout=10), {}

    def all_reduce(tensor, op, group):
        slots[group.rank()] = tensor.clone()
        barrier.wait()
        both = torch.stack([slots[rank] for rank in range(size)])
        reduced = both.amax(0) if op == torch.distributed.ReduceOp.MAX else both.amin(0)
        barrier.wait()
        tensor.copy_(reduced)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    logits = torch.randint(0, 4, (200, 10), generator=torch.Generator().manual_seed(1)).float()
    answers = {}

    def rank_main(rank):
        group = SimpleNamespace(size=lambda: size, rank=lambda: rank)
        part = logits[:, rank * 5 : (rank + 1) * 5]
        answers[rank] = task.vocab_parallel_argmax(part, group)

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    expected = torch.tensor([row.tolist().index(row.max()) for row in logits])
    assert torch.equal(answers[0], expected) and torch.equal(answers[1], expected)
    assert torch.equal(task.vocab_parallel_argmax(logits, None), expected)
