import dataclasses
import json
import subprocess
import sys

import pytest

from fastbd import cli, config


def test_without_arguments_every_verb_shows_an_example(fastbd, tmp_path):
    shown = fastbd(cwd=tmp_path).stdout
    for name, verb in cli.VERBS.items():
        assert f"  {name} " in shown and verb.example in shown and verb.config.__doc__ in shown


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_names_every_flag_and_loads_no_torch(verb, tmp_path):
    code = (
        "import sys, fastbd.cli\n"
        f"try: fastbd.cli.main(['{verb}', '--help'])\n"
        "finally: assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for field in dataclasses.fields(cli.VERBS[verb].config):
        assert f"--{field.name.replace('_', '-')}" in done.stdout


def test_wrong_words_are_answered_with_the_right_ones(fastbd, tmp_path):
    assert "did you mean pretrain?" in fastbd("pretrian", cwd=tmp_path, code=2).stderr
    wrong = fastbd("pretrain", "--objective", "simclr", cwd=tmp_path, code=2)
    assert all(name in wrong.stdout + wrong.stderr for name in ("simclr", "mmcl", "ssl", "mmcl_ssl"))


def test_presets_set_the_defaults_and_say_what_they_cost():
    paper = cli.parse("pretrain", ["--preset", "paper-cc3m", "--lr", "5e-4"])
    assert (paper.model, paper.batch_size, paper.epochs, paper.warmup, paper.lr) == ("rn50", 2048, 64, 10_000, 5e-4)
    for preset in config.PRESETS.values():
        assert "python -m fastbd pretrain" in preset.__doc__


def test_cleaning_takes_the_preset_of_the_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"verb": "pretrain", "config": {"preset": "paper-cc6m"}}))
    assert cli.parse("clean", ["--run", str(tmp_path)]).epochs == 20
    assert cli.parse("clean", ["--run", str(tmp_path), "--preset", "demo"]) == dataclasses.replace(
        config.demo().clean, run=tmp_path
    )


def test_resume_takes_everything_from_the_run(tmp_path):
    before = dataclasses.replace(config.demo().pretrain, lr=0.25, objective="ssl", plan=tmp_path / "x.json")
    recorded = {"verb": "pretrain", "config": config.to_dict(before)}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    assert cli.parse("pretrain", ["--resume", str(tmp_path)]) == dataclasses.replace(before, resume=tmp_path)
    for verb, flags in (("clean", []), ("pretrain", ["--lr", "1"])):
        with pytest.raises(cli.UserError, match="pretrain --resume|leave the other flags out"):
            cli.parse(verb, ["--resume", str(tmp_path), *flags])


@pytest.mark.parametrize("preset", config.PRESETS)
def test_configs_survive_json(preset):
    for settings in vars(config.PRESETS[preset]()).values():
        assert config.from_dict(type(settings), json.loads(json.dumps(config.to_dict(settings)))) == settings
