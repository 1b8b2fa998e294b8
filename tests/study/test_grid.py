from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from fastbd import cli
from fastbd.base.errors import UserError
from fastbd.config.fields import to_dict
from fastbd.config.flags import PoisonConfig, PretrainConfig
from fastbd.config.presets import PRESETS
from fastbd.data.demo import TARGET
from fastbd.study import grid
from fastbd.study.grid import Study, command, expand, study_of, to_values, with_overrides

SMALL = Study(
    name="small",
    about="",
    seeds=(0, 3),
    pretrain=({"objective": ("mmcl", "mmcl_ssl"), "epochs": 2},),
    clean=(
        {"method": "finetune", "objective": ["mmcl", "ssl"], "lr": (1e-4, 1e-3)},
        {"method": "cleanclip", "rows": 500},
    ),
)


def changed(**fields) -> Study:
    return replace(SMALL, **fields)


def ids(study: Study, folder: str = "S") -> dict[str, str]:
    return {run.name: run.id for run in expand(study, Path(folder))}


def test_a_plan_of_the_demo_set_is_known_as_when_each_folder_had_a_set_of_its_own():
    attacked = changed(attacks=({"rate": 0.08},))
    assert expand(attacked, Path("S"))[0].id == "9dbb0a5789a9"


def test_a_study_is_the_product_of_its_axes_in_an_order_that_keeps_steps():
    runs = expand(SMALL, Path("S"))
    assert [run.name for run in runs[:4]] == ["mmcl-s0", "mmcl_ssl-s0", "mmcl-s3", "mmcl_ssl-s3"]
    assert [run.name for run in runs[4:10]] == [
        "mmcl-s0-finetune-mmcl-lr0.0001",
        "mmcl-s0-finetune-mmcl-lr0.001",
        "mmcl-s3-finetune-mmcl-lr0.0001",
        "mmcl-s3-finetune-mmcl-lr0.001",
        "mmcl_ssl-s0-finetune-mmcl-lr0.0001",
        "mmcl_ssl-s0-finetune-mmcl-lr0.001",
    ]
    assert [run.name for run in runs[-4:]] == [f"{o}-s{s}-cleanclip" for o in ("mmcl", "mmcl_ssl") for s in (0, 3)]
    assert len(runs) == 4 + 4 * (2 * 2 + 1)
    last = runs[-1]
    assert last.needs == (runs[3].id,) and last.product == Path("S/runs/mmcl_ssl-s3-cleanclip/result.json")
    preset = PRESETS["demo"]().clean
    assert last.config == replace(preset, rows=500, seed=3, run=Path("S/runs/mmcl_ssl-s3"), out=last.product.parent)


def test_attacks_are_plans_that_seeds_and_objectives_share():
    study = changed(attacks=({"trigger": "badnet", "patch_size": (8, 16)}, {"trigger": "sig", "count": 9}))
    runs = expand(study, Path("S"))
    plans = [run for run in runs if run.verb == "poison"]
    assert [plan.name for plan in plans] == ["badnet-patch_size8", "badnet-patch_size16", "sig"]
    assert plans[0].config == PoisonConfig(
        data=Path("demo"), patch_size=8, rate=0.08, templates="demo", target=TARGET, out=plans[0].product
    )
    assert (plans[2].config.count, plans[2].config.rate) == (9, None)
    models = [run for run in runs if run.verb == "pretrain"]
    assert len(models) == 3 * 2 * 2 and models[1].name == "badnet-patch_size8-mmcl_ssl-s0"
    assert all(model.needs in [(plan.id,) for plan in plans] for model in models)
    assert models[1].config.plan == plans[0].product == Path("S/plans/badnet-patch_size8.poison.json")
    assert [run.name for run in expand(changed(attacks=({"trigger": "sig"},)), Path("S"))][:2] == ["sig", "mmcl-s0"]


def test_runs_that_are_there_can_be_cleaned(tmp_path):
    (tmp_path / "old").mkdir()
    recorded = tmp_path / "old" / "config.json"
    recorded.write_text(json.dumps({"verb": "pretrain", "config": to_dict(PRESETS["paper-cc3m"]().pretrain)}))
    study = changed(pretrain=(), pretrained=(tmp_path / "old",))
    runs = expand(study, Path("S"))
    assert len(runs) == 2 * 5 and runs[0].name == "old-s0-finetune-mmcl-lr0.0001"
    assert runs[0].needs == () and runs[0].config.run == tmp_path / "old"
    before = ids(study)
    recorded.write_text(recorded.read_text().replace('"epochs": 64', '"epochs": 65'))
    assert not set(before.values()) & set(ids(study).values())
    with pytest.raises(UserError, match="no run folder"):
        expand(changed(pretrain=(), pretrained=(tmp_path,)), Path("S"))


def test_ids_are_those_of_the_numbers():
    usual = ids(SMALL)
    assert ids(SMALL, "elsewhere") == usual == ids(with_overrides(SMALL, device="cpu"))
    same = ({"objective": ("mmcl", "mmcl_ssl"), "epochs": 2, "workers": 1, "graph": "off", "log_every": 1},)
    assert ids(changed(pretrain=same)) == usual
    assert grid.material(PretrainConfig()) == {}  # so that a flag that is added changes no id
    longer = ids(with_overrides(SMALL, pretrain_epochs=3))
    assert not set(longer.values()) & set(usual.values())
    halved = ids(with_overrides(SMALL, clean_epochs=2))
    assert {name for name in usual if halved[name] == usual[name]} == {n for n in usual if n.count("-") == 1}
    more = ids(changed(seeds=(0, 3, 5)))
    assert usual.items() <= more.items() and len(more) == len(usual) * 3 / 2
    attacked = ids(changed(attacks=({"trigger": "badnet"},)))
    assert attacked == ids(changed(attacks=({"trigger": "badnet"},)), "elsewhere")
    assert not set(attacked.values()) & set(usual.values())
    assert all(len(int(run_id, 16).to_bytes(6)) == 6 for run_id in usual.values())


def test_names_are_made_of_what_varies():
    entries = (
        {"method": "finetune", "objective": "mmcl", "batch_size": 128, "lr": (1e-4, 1e-3), "epochs": 2},
        {"method": "cleanclip", "views": "slip", "lr": (1e-4, 1e-3), "epochs": 2, "ssl_symmetric": (True, False)},
    )
    names = [run.name for run in expand(changed(seeds=(0,), clean=entries), Path("S")) if "mmcl-s0-" in run.name]
    assert sorted(names) == sorted(
        [f"mmcl-s0-finetune-mmcl-lr{rate}" for rate in ("0.0001", "0.001")]
        + [f"mmcl-s0-cleanclip-lr{r}-{s}ssl_symmetric" for r in ("0.0001", "0.001") for s in ("", "no_")]
    )
    known = {run_id: "mine" for name, run_id in ids(SMALL).items() if name == "mmcl-s0"}
    runs = expand(SMALL, Path("S"), known)
    assert runs[0].name == "mine" and runs[4].config.run == Path("S/runs/mine")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"clean": ()}, "cleans nothing"),
        ({"pretrain": ()}, "needs either pretrain"),
        ({"seeds": (1, 1)}, r"has the seeds \[1, 1\]"),
        ({"preset": "dmo"}, "preset 'dmo'; did you mean demo"),
        (
            {"clean": ({"methd": "cleanclip"},)},
            "entry 1 of clean in the study 'small' has the flag 'methd', which clean has not; did you mean method",
        ),
        ({"clean": ({}, {"lr": ()})}, "entry 2 of clean .* has no value for 'lr'"),
        ({"clean": ({"lr": "fast"},)}, "lr = 'fast'; it must be a number"),
        ({"clean": ({"rows": 1.5},)}, "rows = 1.5; it must be a whole number"),
        ({"clean": ({"rows": True},)}, "rows = True; it must be a whole number"),
        ({"clean": ({"batch_size": "all"},)}, "batch_size = 'all'; it must be a whole number"),
        ({"clean": ({"method": "scrub"},)}, "there is no method 'scrub'. There are 'finetune', 'cleanclip'"),
        ({"clean": ({"epochs": -1},)}, "epochs = -1; give 0 to 2147483647."),
        ({"clean": ({"force": 1},)}, "force = 1; it must be true or false"),
        ({"clean": ({"run": "x"},)}, "gives 'run', which the study itself sets"),
        ({"clean": ({"save_every": 2},)}, "gives 'save_every', which the study itself sets"),
        ({"pretrain": ({"remove_epochs": 3},)}, "remove_epochs = 3; it must be a list"),
        ({"pretrain": ({"remove_epochs": (3, 0.5)},)}, "remove_epochs = .*; it must be a whole number"),
        ({"pretrain": ({"seed": 2},)}, "gives 'seed', which the study itself sets"),
        ({"clean": ("cleanclip",)}, "entry 1 of clean .* is 'cleanclip'"),
    ],
)
def test_mistakes_are_told_when_the_study_is_made(fields, said):
    with pytest.raises(UserError, match=said):
        changed(**fields)


@pytest.mark.parametrize(
    ("study", "said"),
    [
        (changed(clean=({"lr": (1e-3, 1e-3)},)), "the same run twice"),
        (
            changed(clean=({}, {"method": "cleanclip"})),
            "the same run twice, as mmcl-s0-cleanclip and mmcl-s0-cleanclip",
        ),
        (changed(attacks=({}, {"patch_size": 16})), "two attacks .* are the same"),
        (with_overrides(SMALL, data="a.beton"), "give --eval-data"),
        (with_overrides(SMALL, data="a.beton", eval_data=Path("v.beton")), "has no backdoor: give --plan"),
    ],
)
def test_mistakes_that_show_in_the_runs(study, said):
    with pytest.raises(UserError, match=said):
        expand(study, Path("S"))


def test_overrides_go_where_they_belong(tmp_path):
    given = {"data": "a.beton", "plan": Path("a.json"), "eval_data": Path("v.beton"), "model": "tiny-rn"}
    attacked = changed(attacks=({"trigger": "sig"},))
    over = with_overrides(attacked, seeds=[7], precision="fp32", device=None, clean_epochs=1, **given)
    model, *_, last = expand(over, Path("S"))
    assert {flag: getattr(model.config, flag) for flag in given} == given and model.config.seed == 7
    assert (model.config.precision, last.config.precision, model.config.epochs, last.config.epochs) == (
        "fp32",
        "fp32",
        2,
        1,
    )
    assert last.config.eval_data is None  # the run's
    with pytest.raises(UserError, match="leave --plan out"):
        with_overrides(changed(attacks=({"trigger": ("sig", "badnet")},)), plan=Path("a.json"))
    there = with_overrides(changed(pretrain=(), pretrained=(tmp_path,)), eval_data=Path("v.beton"))
    assert all(entry["eval_data"] == Path("v.beton") for entry in there.clean)
    for flag in ({"model": "tiny-rn"}, {"plan": Path("a.json")}, {"pretrain_epochs": 0}):
        name = f"--{next(iter(flag)).replace('_', '-')}"
        with pytest.raises(UserError, match=f"cleans models that are there already: leave {name} out"):
            with_overrides(changed(pretrain=(), pretrained=(tmp_path,)), **flag)


def test_a_study_survives_json(tmp_path):
    study = with_overrides(changed(attacks=({"trigger": "sig", "image": None},)), eval_data=Path("v.beton"))
    values = json.loads(json.dumps(to_values(study)))
    assert expand(study_of(values), Path("S")) == expand(study, Path("S"))
    with pytest.raises(UserError, match="a study has no 'seed'; did you mean seeds"):
        study_of({**values, "seed": [1]})
    with pytest.raises(UserError, match="the study has no 'about'"):
        study_of({name: value for name, value in values.items() if name != "about"})
    with pytest.raises(UserError, match="'seeds' of the study must be a list"):
        study_of({**values, "seeds": 1})


@pytest.mark.parametrize(
    "config",
    [
        PRESETS["demo"]().pretrain,
        replace(PRESETS["paper-cc6m"]().pretrain, classes=None, poison=False, batch_size=96, eps=1e-9),
        replace(PRESETS["demo"]().pretrain, robust="progressive", remove_epochs=(2, 4)),
        replace(PRESETS["demo"]().pretrain, remove_epochs=()),
        replace(PRESETS["paper-cc3m"]().defaults("pretrain", recipe="published"), eda="epoch"),
        replace(PRESETS["demo"]().defaults("clean", "par", "published"), run=Path("a folder/mmcl"), tau=1.0),
        replace(PRESETS["demo"]().defaults("clean", recipe="published"), run=Path("mmcl"), keep_optimizer=False),
        replace(PRESETS["demo"]().clean, run=Path("a folder/mmcl"), force=True, ssl_text=False, lr=3e-05),
        replace(PRESETS["paper-cc3m"]().clean, run=Path("paper"), bn_group=256, resident="none", eval_every="epoch"),
        replace(PRESETS["demo"]().clean, run=Path("paper"), data=Path("pairs-*.beton"), batch_size=64),
        PoisonConfig(data=Path("a.beton"), blend=0.3, trigger="blended", seed=0, text="it's", label_consistent=True),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_command_gives_the_config_back(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("paper").mkdir()
    recorded = {"verb": "pretrain", "config": to_dict(PRESETS["paper-cc3m"]().pretrain)}
    Path("paper/config.json").write_text(json.dumps(recorded))
    python, m, fastbd, verb, *flags = shlex.split(command(config))
    assert (python, m, fastbd) == ("python", "-m", "fastbd") and cli.parse(verb, flags) == config


def test_a_study_or_one_of_its_entries_has_a_recipe():
    entries = {"pretrain": ({},), "clean": ({"recipe": ("corrected", "published")}, {"method": "par"})}
    study = changed(recipe="published", seeds=(0,), **entries)
    start, *cleanings = expand(study, Path("S"))
    assert (start.config.schedule, start.config.recipe) == ("shifted", "published")
    found = {run.name.partition("-")[2]: run.config for run in cleanings}
    assert [(c.recipe, c.schedule, c.keep_optimizer) for c in found.values()][:2] == [
        ("corrected", "exact", False),
        ("published", "shifted", True),
    ]
    assert [c.lr_start for c in found.values() if c.method == "par"] == [3e-5]
    with pytest.raises(UserError, match="has the recipe 'as'; there are corrected, published"):
        changed(recipe="as")


def test_the_command_has_only_the_flags_that_it_needs():
    start = PRESETS["demo"]().clean
    assert (
        command(replace(start, run=Path("runs/mmcl"), lr=1e-4)) == "python -m fastbd clean --run runs/mmcl --lr 0.0001"
    )
    assert command(PRESETS["paper-cc3m"]().pretrain) == "python -m fastbd pretrain --preset paper-cc3m"


def test_a_flag_that_takes_a_list_has_lists_for_an_axis():
    def drops(value) -> list:
        study = changed(pretrain=({"remove_epochs": value},))
        assert ids(study_of(to_values(study))) == ids(study)
        return [run.config.remove_epochs for run in expand(study, Path("S")) if run.name.endswith("s0")]

    assert drops([2, 4]) == [(2, 4)] and drops(()) == [()] and drops(((), (3, 6))) == [(), (3, 6)]
    names = [run.name for run in expand(changed(pretrain=({"remove_epochs": ((2,), (3, 6))},)), Path("S"))]
    assert names[:2] == ["mmcl-remove_epochs2-s0", "mmcl-remove_epochs3_6-s0"]


def test_cleanings_keep_no_epochs():
    """Forty-two of 20 epochs would fill a disk."""
    runs = expand(changed(preset="paper-cc3m", attacks=({},), pretrain=({"eval_data": "v.beton"},)), Path("S"))
    assert {run.verb: run.config.save_every for run in runs[1:]} == {"pretrain": 1, "clean": 0}
    assert grid.material(replace(runs[-1].config, save_every=5)) == grid.material(runs[-1].config)


def test_the_flags_of_an_entry_are_those_of_its_methods():
    study = changed(clean=({"method": "par", "tau": (0.0, 1.0)}, {"method": ("finetune", "cleanclip"), "lr": 1e-5}))
    taus = [run.config.tau for run in expand(study, Path("S")) if run.verb == "clean" and run.config.method == "par"]
    assert set(taus) == {0.0, 1.0}
    for entry in ({"tau": 1.0}, {"method": ("par", "finetune"), "tau": 1.0}):
        with pytest.raises(UserError, match="has the flag 'tau', which only method par has"):
            changed(clean=(entry,))
