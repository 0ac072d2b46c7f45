"""A folder that an older version exported works again once it has this version's code."""

import json

import pytest

from kvshift_megatron.convert.command_line import main
from tests.hf import export

pytestmark = pytest.mark.slow

# Fields that version 0.0 wrote: its configuration was derived from LlamaConfig.
OLDER = {"pretraining_tp": 1}


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """Export folders; break their code and give them config.json as an older version wrote it."""
    directory = tmp_path_factory.mktemp("older") / "folders"
    export.main(str(directory))
    for folder in (directory / name for name in export.MODELS):
        for path in folder.glob("*.py"):
            path.unlink()
        for name in ("configuration", "cache", "modeling"):
            (folder / f"{name}_kvshift.py").write_text("import a_name_that_is_gone\n")
        config = json.loads((folder / "config.json").read_text()) | OLDER
        config.pop("auto_map")
        (folder / "config.json").write_text(json.dumps(config))
    return directory


def test_a_broken_folder_works_after_the_refresh(older, capsys):
    assert export.use(older).returncode == 1
    weights = {path: path.read_bytes() for path in older.rglob("*.safetensors")}
    for name in export.MODELS:
        assert main(["refresh-code", str(older / name)]) == 0
        assert "modeling_kvshift.py" in capsys.readouterr().out
        config = json.loads((older / name / "config.json").read_text())
        assert OLDER.items() <= config.items()
    done = export.use(older)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.read_bytes() for path in weights} == weights


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "has no config.json"),
        ("{", "config.json"),
        ('{"model_type": "llama"}', "model_type='llama' has no code in this package"),
        ('{"model_type": "kvshift_llama", "kv_shift_window": 9}', "kv_shift_window=9"),
        ('{"model_type": "kvshift_llama", "num_attention_heads": "x"}', "config.json: "),
    ],
)
def test_other_folders_are_refused_and_unchanged(config, sentence, tmp_path, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = sorted(tmp_path.iterdir())
    assert main(["refresh-code", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("kvshift-convert: ") and sentence in said and said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
