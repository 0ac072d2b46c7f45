"""The flags that a CPU run gets, and those that it refuses."""

import pytest

from kvshift_megatron.cpu import GPUOnlyFlagError, check_flags, fill_flags, flags

ALL_KNOWN = frozenset(flag for flag, _ in flags.DEFAULTS)


@pytest.fixture
def known(monkeypatch):
    """Stand in for the flags of the installed Megatron, whose parser takes seconds to import."""
    monkeypatch.setattr(flags, "megatron_flags", lambda: ALL_KNOWN)


@pytest.mark.parametrize("refusal", flags.REFUSALS, ids=lambda refusal: refusal.flag)
@pytest.mark.parametrize("joined", [False, True], ids=["space", "equals"])
def test_gpu_only_flag_is_refused_with_a_remedy(refusal, joined):
    flag = refusal.flag.replace("*", "-format")
    for value in refusal.values or ("1",):
        words = [f"{flag}={value}"] if joined else [flag, value]
        with pytest.raises(GPUOnlyFlagError) as caught:
            check_flags(["--num-layers", "2", *words, "--bf16"])
        message = str(caught.value)
        assert flag in message and refusal.remedy in message
        assert "\n" not in message and message.endswith(".")
        assert not refusal.values or value in message


@pytest.mark.parametrize(
    "words",
    [
        ["--transformer-impl", "local"],
        ["--attention-backend=unfused"],
        ["--cuda-graph-impl", "none"],
        ["--profile", "--use-pytorch-profiler"],
        ["--use-distributed-optimizer", "--bf16"],
        ["--save", "nccl"],
        ["--moe-token-dispatcher-type", "alltoall", "--expert-model-parallel-size", "2"],
        [
            "--tensor-model-parallel-size=2",
            "--moe-token-dispatcher-type=alltoall",
            "--expert-tensor-parallel-size=1",
        ],
        ["--tensor-model-parallel-size", "2", "--moe-token-dispatcher-type", "allgather"],
        ["--hybrid-layer-pattern", "G-*-", "--deterministic-mode"],
    ],
)
def test_what_a_cpu_can_do_is_not_refused(words):
    check_flags(words)


@pytest.mark.parametrize("flag", ["--tensor-model-parallel-size", "--expert-tensor-parallel-size"])
def test_gathers_of_unequal_parts_are_refused(flag):
    with pytest.raises(GPUOnlyFlagError, match="set --expert-tensor-parallel-size 1, or use"):
        check_flags(["--moe-token-dispatcher-type", "alltoall", flag, "2"])


def test_the_delta_nets_kernels_are_refused():
    with pytest.raises(GPUOnlyFlagError, match=r"delta net \(G\) .*: add --deterministic-mode"):
        check_flags(["--hybrid-layer-pattern=G-*-"])


def test_missing_flags_are_added(known):
    argv = ["--num-layers", "2"]
    filled = fill_flags(argv)
    assert filled[-2:] == argv and argv == ["--num-layers", "2"]
    for flag, value in flags.DEFAULTS:
        assert flag in filled
        assert value is None or filled[filled.index(flag) + 1] == value
    assert fill_flags(filled) == filled


@pytest.mark.parametrize("words", [["--transformer-impl=local"], ["--transformer-impl", "local"]])
def test_given_flags_are_kept(known, words):
    filled = fill_flags([*words, "--use-cpu-initialization"])
    assert sum(word.startswith("--transformer-impl") for word in filled) == 1
    assert filled.count("--use-cpu-initialization") == 1


def test_flags_unknown_to_the_installed_megatron_are_not_added(monkeypatch):
    monkeypatch.setattr(flags, "megatron_flags", lambda: ALL_KNOWN - {"--no-rope-fusion"})
    filled = fill_flags([])
    assert "--no-rope-fusion" not in filled and "--no-persist-layer-norm" in filled


def test_flags_of_the_installed_megatron_are_known():
    installed = flags.megatron_flags()
    assert installed >= ALL_KNOWN
    assert not {"num-layers", "-num-layers", "--no-such-flag"} & installed


def test_table_names_flags_of_the_installed_megatron():
    installed = flags.megatron_flags()
    for refusal in flags.REFUSALS:
        assert any(refusal.matches(flag, next(iter(refusal.values), None)) for flag in installed), (
            f"{refusal.flag} is not a flag of the installed Megatron"
        )
