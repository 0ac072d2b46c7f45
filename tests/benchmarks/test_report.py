"""Tables, picture, files and the exit code, for a result with known figures."""

import json

import pytest

from tools.benchmarks import command_line, picture, results, sections, tables
from tools.benchmarks.timing import spread

MACHINE = {
    "time": "2031-02-03T04:05:06+00:00",
    "cpu": "Abacus 2",
    "threads": 2,
    "gpus": None,
    "python": "3.12.1",
    "torch": "2.14.1",
    "triton": None,
    "megatron-core": "0.19.2",
    "transformers": None,
    "compiler": None,
}


def _case(shape: list[int], dtype: str, copies: dict[str, float]) -> dict:
    rows = [
        {
            "candidate": name,
            "label": f"label of {name}",
            "own": name != "paper",
            "pass": kind,
            "seconds": spread([value / 100]),
            "copies": spread([value, value + 2, value + 1]),
        }
        for kind in ("forward", "forward and backward")
        for name, value in copies.items()
    ]
    return {
        "device": "cpu",
        "shape": shape,
        "dtype": dtype,
        "copy_seconds": spread([0.01]),
        "compile_seconds": 12.34 if dtype == "fp32" else None,
        "clone_copies": spread([4.0]),
        "bound_copies": {"forward": 1.0, "forward and backward": 2.5},
        "rows": rows,
    }


def _run(tokens: float, ratio: float) -> dict:
    return {
        "tokens_per_second": spread([tokens]),
        "ratio": spread([ratio]),
        "peak_bytes": 3 * 2**30,
        "saved_bytes_a_layer": 5 * 2**20,
    }


def _result() -> dict:
    cases = [
        _case([64, 2, 4, 8], dtype, {"paper": 201.0, "chosen": 3.25}) for dtype in ("fp32", "bf16")
    ]
    runs = {"vanilla": _run(1000, 1), "kv_shift": _run(987, 0.987)}
    decode = {"batch": 8, "runs": {"llama": _run(50, 1), "kv_shift": _run(49, 0.98)}}
    return {
        "quick": False,
        "machine": MACHINE,
        "seconds": 600.0,
        "failed": {},
        "sections": {
            "operation": {
                "cases": cases,
                "keeps_freed_memory": True,
                "refused": {},
                "not_measured": {"GPU": "this machine has none"},
            },
            "pages": {"system": cases[0], "kept": cases[0]},
            "step": {"model": {"layers": 2}, "dtype": "fp32", "runs": runs},
            "decode": {"device": "cpu", "dtype": "fp32", "cases": [decode]},
            "scaling": {
                "operation": {"sequence": cases[:1], "heads": cases[:1]},
                "layouts": {"TP 2": {"runs": runs}},
                "not_measured": {"GPU": "this machine has none"},
            },
            "conversion": {
                "bytes": 2e8,
                "bytes_per_second": {"cp": spread([1.5e9])},
                "tokens_per_second": spread([2e7]),
            },
        },
    }  # fmt: skip


def test_the_tables_contain_every_section():
    text = tables.markdown(_result())
    for line in (
        "2031-02-03: Abacus 2, 2 threads, no GPU; Python 3.12.1, torch 2.14.1",
        "| forward and backward, all gradients | fp32 [64, 2, 4, 8] | bf16 [64, 2, 4, 8] |",
        "(median and quartiles; freed memory kept):",
        "| the bound | 2.5 | 2.5 |",
        "| torch.compile's first call, s | 12.3 | not measured |",
        "| label of paper | 202 (202 to 202) | 202 (202 to 202) |",
        "| label of chosen | 4.25 (3.75 to 4.75) | 4.25 (3.75 to 4.75) |",
        "| copy into new memory | 40 (40 to 40) | 40 (40 to 40) |",
        "| baseline model | 1000 (1000 to 1000) | 1 (1 to 1) | 3072 | 5.00 |",
        "| KV shifting | 987 (987 to 987) | 0.987 (0.987 to 0.987) | 3072 | 5.00 |",
        "| KV shifting, batch 8 | 49 (49 to 49) | 0.98 (0.98 to 0.98) |",
        "| sequence: [64, 2, 4, 8] | 4.25 (3.75 to 4.75) | not measured |",
        "| cp | 1.5 (1.5 to 1.5) |",
    ):
        assert line in text, line
    assert text.count("- GPU: not measured (this machine has none)") == 1


def test_the_picture_is_a_complete_file(tmp_path):
    path = tmp_path / "benchmark.png"
    assert picture.draw(_result(), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [file.name for file in tmp_path.iterdir()] == ["benchmark.png"]
    nothing = _result() | {"sections": {}}
    assert not picture.draw(nothing, tmp_path / "none.png")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "benchmark.json"
    results.write_json(path, {"figure": 1.0})
    with pytest.raises(ValueError):
        results.write_json(path, {"figure": float("nan")})
    assert json.loads(path.read_text()) == {"figure": 1.0}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("trouble", ["none", "refused", "failed"])
def test_exit_code_and_files(monkeypatch, capsys, tmp_path, trouble):
    """What is refused or fails is reported, and the rest is still written."""

    def run(section, settings, progress):
        assert settings.quick
        progress(0.5, "half-way")
        if section.name == "decode" and trouble == "failed":
            raise sections.SectionFailed("decode: ended with exit code 9")
        result = _result()["sections"][section.name]
        if section.name == "operation" and trouble == "refused":
            result["refused"] = {"label of x": "label of x: shifted key differs"}
        return result

    monkeypatch.setattr(command_line, "run", run)
    monkeypatch.setattr(command_line.machine, "describe", lambda: MACHINE)
    code = command_line.main(["--quick", "--only", "decode,operation", "--output", str(tmp_path)])
    assert code == (0 if trouble == "none" else 1)
    printed = capsys.readouterr()
    assert "operation: half-way" in printed.out and "left]" in printed.out
    expected = {
        "none": "",
        "refused": "REFUSED: label of x: shifted key differs",
        "failed": "failed: decode: ended with exit code 9",
    }[trouble]
    assert expected in printed.err
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    # In the fixed order, not in that of the command line.
    assert list(saved["sections"]) == ["operation", "decode"][: 1 if trouble == "failed" else 2]
    assert (tmp_path / "benchmark.md").read_text().startswith("2031-02-03")
    assert (tmp_path / "benchmark.png").exists()


def test_unknown_sections_are_refused(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--only", "operation,speed"])
    assert "'speed' is not a section: choose from operation, pages" in capsys.readouterr().err
