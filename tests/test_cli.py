from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import typing
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

from fastbd import cli
from fastbd.base.errors import UserError
from fastbd.config import presets
from fastbd.config.cards import METHODS
from fastbd.config.fields import flags_of, from_dict, outside, to_dict
from fastbd.config.flags import DetectConfig, PretrainConfig
from fastbd.config.presets import PRESETS


def test_version_is_that_of_the_package(capsys):
    for flag in ("--version", "-V"):
        assert cli.main([flag]) == 0
        assert capsys.readouterr().out == f"fastbd {version('fastbd')}\n"


def test_no_argument_shows_every_verb_with_its_example(tmp_path, fastbd):
    shown = fastbd(cwd=tmp_path).stdout
    for name, verb in cli.VERBS.items():
        assert f"  {name} " in shown and verb.example in shown and verb.config.__doc__ in shown
    assert fastbd("--help", cwd=tmp_path).stdout == shown


def test_every_example_is_a_valid_command_line():
    for name, verb in cli.VERBS.items():
        words = verb.example.split()
        assert words[:4] == ["python", "-m", "fastbd", name]
        assert isinstance(cli.parse(name, words[4:]), verb.config)


def test_help_of_every_verb_describes_each_flag_and_needs_no_torch(tmp_path):
    code = (
        "import contextlib, io, json, sys\n"
        "from fastbd import cli\n"
        "shown = {}\n"
        "for verb in cli.VERBS:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "        cli.main([verb, '--help'])\n"
        "    shown[verb] = out.getvalue()\n"
        "assert not {'torch', 'numpy', 'PIL', 'matplotlib', 'jinja2'} & set(sys.modules), 'heavy'\n"
        "print(json.dumps(shown))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    shown = json.loads(done.stdout)
    for name, verb in cli.VERBS.items():
        assert f"usage: python -m fastbd {name} [-h]" in shown[name]
        assert re.search(rf"^(Example:)? *python -m fastbd {name}\b", shown[name], re.MULTILINE), name
        for field in dataclasses.fields(verb.config):
            assert f"--{field.name.replace('_', '-')} " in shown[name].replace(",", " "), (name, field.name)
        assert "(default: None)" not in shown[name] and "{None}" not in shown[name]


def groups_of_help(verb: str, *flags: str) -> dict[str | None, str]:
    """The boxes of --help by their titles, each as one line of words."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        cli.parse(verb, [*flags, "--help"])
    parts = re.split(r"^ *(?:(\S+) )?options +$", out.getvalue(), flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_help_shows_each_flag_once_in_the_group_of_its_class(monkeypatch):
    """Its text is that of the source, and its default that of the preset."""
    monkeypatch.setenv("COLUMNS", "80")  # in a wide terminal the groups stand side by side
    boxes = groups_of_help("clean", "--method", "par", "--preset", "par")
    assert list(boxes)[1:] == ["clean", "schedule", "losses", "images", "evaluation", "machine", "output", "par"]
    for flag, group in (("epochs", "schedule"), ("device", "machine"), ("tau", "par"), ("landed", "evaluation")):
        assert [name for name, text in boxes.items() if f"--{flag} " in text] == [group]
    assert "--epochs INT Passes over the data. (default: 10)" in boxes["schedule"]
    assert "--run PATH Run folder of the model to clean. --checkpoint" in boxes["clean"]


GROUPS = {
    "build": ["files", "source", "classes", "storage", "machine"],
    "poison": ["files", "target", "pairs", "trigger"],
    "evaluate": ["model", "data", "attack", "measures", "rebound", "output", "machine"],
    "sweep": ["study", "data", "search", "output", "machine"],
    "detect": ["data", "neighbours", "output", "machine"],
}


def test_help_of_a_verb_with_many_flags_is_in_groups_first_those_that_it_needs(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    many = {name for name, verb in cli.VERBS.items() if len(dataclasses.fields(verb.config)) > 10}
    assert many == {"pretrain", "clean", *GROUPS}
    for verb, groups in GROUPS.items():
        boxes = groups_of_help(verb)
        assert list(boxes) == [None, *groups]
        assert [name for name, text in boxes.items() if "(required)" in text] in ([], groups[:1])


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--contu", "3"], "--count INT Pairs to poison; give this or --rate."),
        (["--count", "x"], "--count INT Pairs to poison; give this or --rate."),
        (["--patch-sise", "3"], "--patch-size INT Side of a patch, in pixels of the model's input. (default: 16)"),
    ],
)
def test_a_mistake_shows_the_flag_as_help_does(flags, shown, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse("poison", ["--data", "pairs.beton", *flags])
    said = " ".join(capsys.readouterr().err.translate({ord(sign): " " for sign in "│|"}).split())
    assert ended.value.code == 2 and shown in said and "None" not in said
    assert said.count("For full helptext") == 1


@pytest.mark.parametrize("arguments", [[], ["pretrain", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fastbd", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_an_unknown_verb_gets_a_suggestion(tmp_path, fastbd):
    said = fastbd("pretrian", cwd=tmp_path, code=2).stderr
    assert said == "error: there is no verb 'pretrian'; did you mean pretrain?\n"
    assert "python -m fastbd lists them" in fastbd("xyz", cwd=tmp_path, code=2).stderr


def test_a_wrong_value_lists_the_right_ones(tmp_path, fastbd):
    done = fastbd("pretrain", "--objective", "clip", cwd=tmp_path, code=2)
    assert all(name in done.stdout + done.stderr for name in ("objective 'clip'", "'mmcl'", "'ssl'", "'mmcl_ssl'"))
    assert list(tmp_path.iterdir()) == []


REQUIRED = {
    "build": ("--source", "pairs.csv", "--out", "pairs.beton"),
    "poison": ("--data", "pairs.beton"),
    "evaluate": ("--run", "runs/start"),
    "detect": ("--run", "runs/start"),
    "label": ("--run", "runs/start", "--out", "labels.npy"),
    "export": ("--run", "runs/start", "--to", "hf", "--out", "exported"),
}


def of_numbers(kind: type) -> list[tuple[str, type, bool]]:
    """(field, int or float, whether a tuple) of each flag of a number."""

    def parts(hint) -> set:
        return {hint}.union(*map(parts, typing.get_args(hint)))

    hints = {name: parts(hint) for name, hint in typing.get_type_hints(kind).items()}
    of = {name: next((number for number in (float, int) if number in some), None) for name, some in hints.items()}
    return [(name, of[name], any(typing.get_origin(x) is tuple for x in hints[name])) for name in hints if of[name]]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_flag_of_a_number_refuses_what_is_none_and_what_is_beyond_its_range(verb):
    """A new flag needs a range in its Flag."""
    kind = cli.VERBS[verb].config
    for name, of, several in of_numbers(kind):
        least, most, without = flags_of(kind)[name].range
        if of is float:
            beyond = [math.nan, math.inf, -math.inf, *map(float, without)]
            beyond += [least - 0.5, *([most + 0.5] if most < math.inf else [])]
        else:
            beyond = [least - 1, most + 1, 10**40, -(10**40)]
        assert all(outside(kind, name, (value,) if several else value) for value in beyond), name


@pytest.mark.parametrize(
    ("verb", "flag", "value", "numbers"),
    [
        ("pretrain", "--lr", "nan", "a finite number from 0"),
        ("pretrain", "--lr", "-1.0", "a finite number from 0"),
        ("clean", "--lr", "inf", "a finite number from 0"),
        ("clean", "--beta2", "1.0", "0 to 1, but not 1"),
        ("clean", "--eps", "0.0", "a finite number above 0"),
        ("clean", "--ssl-weight", "nan", "a finite number from 0"),
        ("pretrain", "--landed", "2.0", "0 to 1"),
        ("pretrain", "--epochs", "-1", "0 to 2147483647"),
        ("poison", "--rate", "0.0", "0 to 1, but not 0"),
        ("detect", "--drop", "1.0", "0 to 1, but not 0 or 1"),
        ("evaluate", "--asr-seed", str(2**63), "-9223372036854775808 to 9223372036854775807"),
        ("sweep", "--lease", "inf", "a finite number from 1"),
    ],
)
def test_a_number_beyond_its_range_is_refused_in_one_sentence(verb, flag, value, numbers):
    with pytest.raises(UserError) as said:
        cli.parse(verb, [*REQUIRED.get(verb, ()), flag, value])
    assert str(said.value) == f"{flag} {value} is out of range: give {numbers}."


def test_what_would_make_no_sense_is_in_no_range():
    """Of the fields, a negative number but where it has a meaning; of the betas 1, with which a mean never moves."""
    meant = {"seed", "seeds", "asr_seed", "unlearn_target"}
    for verb in cli.VERBS.values():
        for name, of, _ in of_numbers(verb.config):
            assert name in meant or outside(verb.config, name, of(-1)), name
    for name, value in (("beta1", 1.0), ("beta2", 1.0), ("eps", 0.0), ("landed", 2.0), ("max_bad", 2.0)):
        assert outside(PretrainConfig, name, value), name
    assert outside(DetectConfig, "k", 0)


def test_the_ends_of_a_range_are_in_it_and_so_are_the_defaults():
    for kind in (verb.config for verb in cli.VERBS.values()):
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        ranges = {name: flag.range for name, flag in flags_of(kind).items() if flag.range}
        for name, numbers in ranges.items():
            ends = {numbers.least, numbers.most} - set(numbers.without)
            assert not any(outside(kind, name, value) for value in [*ends, defaults[name]]), name
    for preset in PRESETS.values():
        for settings in (preset().pretrain, *map(partial(preset().defaults, "clean"), METHODS)):
            assert not any(outside(type(settings), name, value) for name, value in vars(settings).items())


def test_each_number_of_a_list_is_looked_at():
    message = "--remove-epochs 3 -1 6 is out of range: give 0 to 2147483647"
    with pytest.raises(UserError, match=message):
        cli.parse("pretrain", ["--remove-epochs", "3", "-1", "6"])


@pytest.mark.parametrize(
    ("verb", "flag"),
    [
        ("evaluate", "--asr-seed"),
        ("evaluate", "--eval-data"),
        ("sweep", "--pretrained"),
        ("sweep", "--seeds"),
        ("doctor", "--data"),
        ("report", "--runs"),
    ],
)
def test_a_list_without_a_value_is_refused(verb, flag):
    with pytest.raises(UserError, match=f"^{flag} has no value: give one or more, or leave it out.$"):
        cli.parse(verb, [*REQUIRED.get(verb, ()), flag])


def test_only_where_a_default_holds_none_a_list_may_be_empty():
    """As there it means something: a new list is refused without a value unless its default is one."""
    assert cli.parse("pretrain", ["--remove-epochs"]).remove_epochs == ()
    empty = {
        field.name for verb in cli.VERBS.values() for field in dataclasses.fields(verb.config) if field.default == ()
    }
    assert empty == {"remove_epochs", "track"}


def test_the_help_of_a_preset_tells_its_commands_and_its_cost(tmp_path, fastbd):
    shown = " ".join(fastbd("pretrain", "--preset", "paper-cc3m", "--help", cwd=tmp_path).stdout.split())
    for line in presets.paper_cc3m.__doc__.split("\n"):
        assert " ".join(line.split()) in shown
    assert "(default: 2048)" in shown and "(default: imagenet1k)" in shown


def test_a_preset_gives_the_defaults_and_flags_win():
    chosen = cli.parse("pretrain", ["--preset=paper-cc6m", "--epochs", "3"])
    assert chosen == dataclasses.replace(presets.paper_cc6m().pretrain, epochs=3)


def test_a_method_has_defaults_of_its_own_in_a_preset():
    chosen = cli.parse("clean", ["--preset", "paper-cc6m", "--method", "supervised"])
    assert (chosen.epochs, chosen.batch_size, chosen.warmup, chosen.lr, chosen.weight_decay) == (
        10,
        80,
        500,
        1e-4,
        0.01,
    )
    assert cli.parse("clean", ["--preset", "paper-cc6m", "--method", "deep_cluster"]).clusters == 1000


def test_cleaning_starts_from_the_preset_of_the_run(tmp_path):
    recorded = {"verb": "pretrain", "config": to_dict(presets.paper_cc3m().pretrain)}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    chosen = cli.parse("clean", ["--run", str(tmp_path), "--lr", "0.5"])
    assert chosen == dataclasses.replace(presets.paper_cc3m().clean, run=tmp_path, lr=0.5)
    # A preset that is given wins.
    assert cli.parse("clean", ["--run", str(tmp_path), "--preset", "demo"]).batch_size == 64


def test_resume_takes_its_settings_from_the_run_and_no_flags(tmp_path):
    recorded = {"verb": "pretrain", "config": to_dict(PretrainConfig(epochs=7, model="rn50"))}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    resumed = cli.parse("pretrain", ["--resume", str(tmp_path)])
    assert resumed == PretrainConfig(epochs=7, model="rn50", resume=tmp_path)
    for flags in (["--resume", str(tmp_path), "--epochs", "9"], ["--lr=1", f"--resume={tmp_path}"]):
        with pytest.raises(UserError, match="--resume takes every setting from the run folder"):
            cli.parse("pretrain", flags)
    with pytest.raises(UserError, match=f"made by pretrain: python -m fastbd pretrain --resume {tmp_path}"):
        cli.parse("clean", ["--resume", str(tmp_path)])


# No file keeps the configs of these, which hold tuples.
TO_JSON = [verb.config for name, verb in cli.VERBS.items() if name not in ("report", "evaluate", "sweep")]


@pytest.mark.parametrize("kind", TO_JSON)
def test_a_config_survives_json(kind, tmp_path, monkeypatch):
    """Each optional field is set once."""
    monkeypatch.chdir(tmp_path)
    hints = typing.get_type_hints(kind)

    def is_path(hint) -> bool:
        return hint is Path or (Path in typing.get_args(hint) and typing.get_origin(hint) is not tuple)

    values = {"source": Path("a"), "out": Path("b"), "data": Path("c"), "run": Path("d")}
    filled = {f.name: values.get(f.name, Path("e")) for f in dataclasses.fields(kind) if is_path(hints[f.name])}
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in filled]
    original = kind(**filled, **{name: typing.get_args(hints[name])[0] for name in required})
    restored = from_dict(kind, json.loads(json.dumps(to_dict(original))) | {"gone": 1})
    assert restored == dataclasses.replace(original, **{name: path.absolute() for name, path in filled.items()})


def test_files_are_recorded_by_absolute_paths_and_names_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.beton", "classes.txt", "demo"):
        Path(name).touch()
    given = PretrainConfig(data="pairs.beton", classes="classes.txt", templates="demo", plan=Path("p.json"))
    recorded = to_dict(given)
    assert recorded["data"] == f"{tmp_path}/pairs.beton" and recorded["classes"] == f"{tmp_path}/classes.txt"
    assert recorded["plan"] == f"{tmp_path}/p.json" and recorded["templates"] == "demo"


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset", "demo", "--preset", "paper-cc3m"],
        ["--preset=paper-cc3m", "--preset=demo"],
        ["--preset", "paper-cc3m", "--preset=par", "--batch_size=9"],
        ["--preset=par", "--no_poison", "--seed", "-1", "--remove_epochs", "1", "2", "--preset", "par-2"],
        ["--templates=--preset", "--preset", "paper-cc6m"],
        ["--preset", "paper-cc6m", "--"],
        ["--preset", "paper-cc3m", "--plan", "None", "--preset", "demo", "--out", "a"],
    ],
)
def test_the_last_preset_is_recorded_and_gives_the_defaults(flags):
    chosen = cli.parse("pretrain", flags)
    defaults = PRESETS[chosen.preset]().pretrain
    assert chosen.preset == [word.split("=")[-1] for word in flags if word.split("=")[-1] in PRESETS][-1]
    assert (chosen.epochs, chosen.classes, chosen.warmup) == (defaults.epochs, defaults.classes, defaults.warmup)


@pytest.mark.parametrize("flags", [["--", "--preset", "par"], ["--pre", "par"], ["--Preset", "par"], ["--preset"]])
def test_what_is_not_a_preset_for_tyro_is_none_for_us(flags, capsys):
    with pytest.raises(SystemExit):
        cli.parse("pretrain", flags)
    assert "--preset" in capsys.readouterr().err or flags[0] in ("--pre", "--Preset")


def test_the_last_method_and_the_last_run_win(tmp_path):
    for name in ("paper-cc3m", "paper-cc6m"):
        (tmp_path / name).mkdir()
        recorded = {"verb": "pretrain", "config": to_dict(PRESETS[name]().pretrain)}
        (tmp_path / name / "config.json").write_text(json.dumps(recorded))
    chosen = cli.parse("clean", ["--method=par", "--method", "supervised", "--preset", "paper-cc3m"])
    assert chosen == presets.paper_cc3m().defaults("clean", "supervised")
    runs = [f"--run={tmp_path}/paper-cc3m", "--run", str(tmp_path / "paper-cc6m")]
    assert cli.parse("clean", runs).preset == "paper-cc6m"
    assert cli.parse("clean", [*runs, f"--run={tmp_path}/paper-cc3m"]).preset == "paper-cc3m"


@pytest.fixture
def run_folder(tmp_path, monkeypatch) -> None:
    """A folder with a run, `run`, and files of the kinds that flags name."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    recorded = {"verb": "pretrain", "config": to_dict(presets.paper_cc3m().pretrain)}
    Path("run/config.json").write_text(json.dumps(recorded))
    for name in ("run/env.json", "run/ckpt_last.pt", "run/ckpt_epoch_021.pt", "RN50.pt"):
        Path(name).touch()


@pytest.mark.parametrize(
    ("verb", "more"),
    [("clean", []), ("evaluate", []), ("detect", []), ("label", ["--out", "a.npy"])],
)
def test_a_checkpoint_of_a_run_means_the_run_and_that_checkpoint(run_folder, verb, more):
    for name, checkpoint in (("ckpt_last.pt", "last"), ("ckpt_epoch_021.pt", "21")):
        chosen = cli.parse(verb, ["--run", f"run/{name}", *more])
        assert (chosen.run, chosen.checkpoint) == (Path("run"), checkpoint)
    chosen = cli.parse(verb, ["--run=run/ckpt_epoch_021.pt", "--checkpoint", "last", *more])
    assert (chosen.run, chosen.checkpoint) == (Path("run"), "last")
    if verb == "clean":
        assert cli.parse(verb, ["--run", "run/ckpt_last.pt"]).preset == "paper-cc3m"
    with pytest.raises(UserError, match=r"--run RN50\.pt is a file: .* pretrain --weights RN50\.pt --epochs 0"):
        cli.parse(verb, ["--run", "RN50.pt", *more])


def test_what_takes_the_last_checkpoint_alone_refuses_others(run_folder):
    assert cli.parse("pretrain", ["--resume", "run/ckpt_last.pt"]) == cli.parse("pretrain", ["--resume", "run"])
    assert cli.parse("sweep", ["--pretrained", "run/ckpt_last.pt", "run"]).pretrained == (Path("run"), Path("run"))
    assert cli.parse("report", ["--runs", "run/ckpt_epoch_021.pt"]).runs == (Path("run"),)
    assert cli.parse("report", ["--compare", "run", "run/ckpt_last.pt"]).compare == (Path("run"), Path("run"))
    for verb, flag in (("pretrain", "--resume"), ("sweep", "--pretrained")):
        match = rf"{flag} takes the last checkpoint of a run, not ckpt_epoch_021\.pt: give the folder run"
        with pytest.raises(UserError, match=match):
            cli.parse(verb, [flag, "run/ckpt_epoch_021.pt"])
        with pytest.raises(UserError, match=rf"{flag} RN50\.pt is a file: .* --weights RN50\.pt"):
            cli.parse(verb, [flag, "RN50.pt"])


FILES = [(name, flag) for name, verb in cli.VERBS.items() for flag, mark in flags_of(verb.config).items() if mark.file]
NEEDED = {
    "build": ["--source", "a", "--out", "b"],
    "poison": ["--data", "a"],
    "evaluate": ["--run", "a"],
    "detect": ["--run", "a"],
    "label": ["--run", "a", "--out", "b"],
}


@pytest.mark.parametrize(("verb", "flag"), FILES)
def test_a_folder_where_a_file_is_meant(verb, flag, run_folder):
    flag = f"--{flag.replace('_', '-')}"
    with pytest.raises(UserError, match=f"^{flag} run is a folder: give a .*"):
        cli.parse(verb, [*NEEDED.get(verb, []), flag, "run"])


def test_a_folder_where_a_file_is_meant_names_one_that_is_in_it(run_folder):
    for name in ("b.beton", "a.beton"):
        Path("run", name).touch()
    with pytest.raises(UserError, match=r"give a \.beton file, .*, such as run/a\.beton\.$"):
        cli.parse("poison", ["--data", "run"])
    Path("demo").mkdir()
    assert cli.parse("pretrain", ["--data", "demo"]).data == "demo"  # the name of the set that is built in


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.json"), "the disk is full: a.json could not be written"),
        (OSError(errno.EIO, "Input/output error", "a.pt"), "a.pt cannot be read or written (Input/output error)"),
        (PermissionError(errno.EACCES, "Permission denied", "a.pt"), "a.pt cannot be read or written (Permission"),
        (MemoryError("Unable to allocate 9 GiB"), "memory is short (Unable to allocate 9 GiB): free some"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(error, said, monkeypatch, capsys):
    def run(config):
        raise error

    monkeypatch.setattr("fastbd.commands.report.run", run)
    assert cli.main(["report", "--runs", "run"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("fastbd.config.imports._sources", {})  # other tests name code in this folder
    monkeypatch.setattr("fastbd.commands.report.run", lambda config: [][1])
    with pytest.raises(IndexError):
        cli.main(["report", "--runs", "run"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"config": None}, "has no 'config'"),
        ({"verb": None}, "has no 'verb'"),
        ({"config": {"workers": "many"}}, "workers is 'many', and must be a whole number"),
        ({"config": {"workers": -3}}, "--workers -3 is out of range"),
        ({"config": {"decode": "bogus"}}, "decode is 'bogus', and must be one of"),
        ({"config": {"plan": ["a"]}}, "plan is .*, and must be a path"),
    ],
)
def test_settings_that_cannot_be_are_found_before_a_run_is_resumed(tmp_path, changed, said):
    (tmp_path / "config.json").write_text(json.dumps({"verb": "pretrain", "config": {}, **changed}))
    with pytest.raises(UserError, match=f"config.json .*{said}"):
        cli.parse("pretrain", ["--resume", str(tmp_path)])
