"""A study as a value, and the runs that it stands for."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import shlex
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastbd.base.errors import UserError
from fastbd.base.files import read_json
from fastbd.base.run_folder import read_config
from fastbd.config.cards import check, owners
from fastbd.config.fields import flags_of, outside, typed, types_of
from fastbd.config.flags import CHOOSERS, CleanConfig, PoisonConfig, PretrainConfig, Recipe, config_of
from fastbd.config.presets import PRESETS

Config = PoisonConfig | PretrainConfig | CleanConfig
Entry = Mapping[str, Any]  # flag -> value, or a tuple or list of values: an axis; it stands for the product of its axes
Verb = Literal["poison", "pretrain", "clean"]
VERBS: dict[type, Verb] = {PoisonConfig: "poison", PretrainConfig: "pretrain", CleanConfig: "clean"}
KINDS = {"attacks": PoisonConfig, "pretrain": PretrainConfig, "clean": CleanConfig}
DEMO_DATA = Path("data/demo/train.beton")  # what plans of the demo set are known by, as it was made there at first
DEMO_ATTACK = {"rate": 0.08, "templates": "demo"}  # as in the demo set's own plan
TITLES = ("trigger", "objective", "method")  # flags whose values need no name before them


@dataclass(frozen=True, kw_only=True)
class Study:
    """Attacks x pre-trainings x seeds x cleanings. UserError where an entry makes no sense."""

    name: str
    about: str
    """A sentence that says what it asks; a sweep prints it before its runs."""
    preset: str = "demo"
    """What the entries change."""
    recipe: Recipe = "corrected"
    """That of the entries which give none."""
    seeds: tuple[int, ...] = (0,)
    """Each is the seed of pre-training and of cleaning both."""
    attacks: tuple[Entry, ...] = ()
    """Flags of poison; none: the plan of the pre-training's data."""
    pretrain: tuple[Entry, ...] = ()
    """Flags of pretrain."""
    pretrained: tuple[Path, ...] = ()
    """Run folders to clean, in place of pre-training."""
    clean: tuple[Entry, ...] = ()
    """Flags of clean."""
    searched: tuple[Entry, ...] = ()
    """Cleanings that a search has added: flags of clean, the name of the model's folder, and the seed."""

    def __post_init__(self) -> None:
        where = f"the study '{self.name}'"
        if self.preset not in PRESETS:
            raise UserError(f"{where} has the preset '{self.preset}'{nearest(self.preset, PRESETS)}")
        if self.recipe not in (recipes := typing.get_args(Recipe)):
            raise UserError(f"{where} has the recipe '{self.recipe}'{nearest(self.recipe, recipes)}")
        if not self.clean:
            raise UserError(f"{where} cleans nothing: give it an entry of clean.")
        if bool(self.pretrain) == bool(self.pretrained) or (self.attacks and self.pretrained):
            raise UserError(f"{where} needs either pretrain (and attacks, if any) or pretrained, the models to clean.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or {type(s) for s in self.seeds} != {int}:
            raise UserError(f"{where} has the seeds {list(self.seeds)}: give one or more whole numbers, each once.")
        for kind in KINDS:
            settings(self, kind)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run to be made."""

    id: str
    """12 hex digits: the same for what gives the same numbers, in any folder."""
    verb: Verb
    config: Config
    needs: tuple[str, ...]
    """Ids of the runs that come before."""
    name: str

    @property
    def out(self) -> Path:
        """The run's folder; of a poisoning the plan's file."""
        assert self.config.out is not None, "a run is planned with its place"
        return self.config.out

    @property
    def product(self) -> Path:
        """The file that is there when the run has ended."""
        return self.out if self.verb == "poison" else self.out / "result.json"

    @property
    def finished(self) -> bool:
        """Whether its product is there, whole; a pre-training that diverged has made no model to clean."""
        try:
            product = read_json(self.product, "it is made again")
        except (UserError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        return isinstance(product, dict) and (self.verb != "pretrain" or product.get("reason") != "diverged")


class _Model(NamedTuple):
    """What cleanings start from."""

    place: int
    seed: int
    name: str
    folder: Path
    identity: str
    needs: tuple[str, ...]


def study_of(values: Mapping[str, Any]) -> Study:
    """The study with these fields, read from JSON or TOML."""
    fields = {f.name: f for f in dataclasses.fields(Study)}
    for name in values:
        if name not in fields:
            raise UserError(f"a study has no '{name}'{nearest(name, fields)}")
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in values]
    if missing:
        raise UserError(f"the study has no '{missing[0]}'; add it.")
    for name in ("seeds", "attacks", "pretrain", "pretrained", "clean", "searched"):
        if not isinstance(values.get(name, []), list):
            raise UserError(f"'{name}' of the study must be a list.")
    for name in ("name", "about", "preset", "recipe"):
        if not isinstance(values.get(name, ""), str):
            raise UserError(f"'{name}' of the study must be a text.")
    tuples = {name: _tuples(value) for name, value in values.items()}
    return Study(**{**tuples, "pretrained": tuple(map(Path, values.get("pretrained", ())))})


def _tuples(value: Any) -> Any:
    """The value with tuples for its lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def to_values(study: Study) -> dict[str, Any]:
    """The inverse of study_of, for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(study), default=str))


def with_overrides(
    study: Study,
    *,
    seeds: Sequence[int] | None = None,
    pretrain_epochs: int | None = None,
    clean_epochs: int | None = None,
    **flags: Any,
) -> Study:
    """The study with flags of a command line in all its entries; those that are None are left out.

    precision and device go to pre-training and cleaning; the others (data, plan, eval_data, classes, templates, model)
    to pre-training, from which cleaning takes them, or to cleaning where the models are there already.
    """
    flags = {name: value for name, value in flags.items() if value is not None}
    if "plan" in flags and len(settings(study, "attacks")) > 1:
        raise UserError(f"the study '{study.name}' compares attacks of its own; leave --plan out.")
    given = flags | ({} if pretrain_epochs is None else {"pretrain_epochs": pretrain_epochs})
    if study.pretrained and (vain := [name for name in ("model", "plan", "pretrain_epochs") if name in given]):
        flag = vain[0].replace("_", "-")
        raise UserError(f"the study '{study.name}' cleans models that are there already: leave --{flag} out.")
    both = {name: value for name, value in flags.items() if name in ("precision", "device")}
    pretrain = flags | ({} if pretrain_epochs is None else {"epochs": pretrain_epochs})
    clean = (flags if study.pretrained else both) | ({} if clean_epochs is None else {"epochs": clean_epochs})
    return replace(
        study,
        seeds=study.seeds if seeds is None else tuple(seeds),
        attacks=() if "plan" in flags else study.attacks,
        pretrain=tuple({**entry, **pretrain} for entry in study.pretrain),
        clean=tuple({**entry, **clean} for entry in study.clean),
    )


def expand(study: Study, folder: Path, known: Mapping[str, str] | None = None) -> tuple[Planned, ...]:
    """The study's runs in `folder`: plans, then pre-trainings, then cleanings, each after what it needs.

    Cleanings that differ only in model, seed and learning rate follow one another, in this order, so that one process
    can use its compiled step again, and a seed's data and start. `known` names runs by id that have a folder already.
    UserError where two runs are the same.
    """
    known = known or {}
    earlier, models = _pretraining(study, folder, known) if study.pretrain else ([], _pretrained(study))
    preset, given = PRESETS[study.preset](), settings(study, "clean")
    given = [{"method": preset.clean.method, **values} for values in given]
    structures = [{flag: value for flag, value in values.items() if flag != "lr"} for values in given]
    cleanings = []
    for model, (which, (values, name)) in product(models, enumerate(zip(given, _names(given), strict=True))):
        base = preset.defaults("clean", values["method"], values.get("recipe", study.recipe))
        config = replace(base, **values, seed=model.seed, run=model.folder, save_every=0)
        run = _planned(config, f"{model.name}-{name}", folder, known, start=(model.identity,), needs=model.needs)
        place = (structures.index(structures[which]), model.place, study.seeds.index(model.seed), which)
        cleanings.append((place, run))
    runs = (*earlier, *(run for _, run in sorted(cleanings, key=lambda pair: pair[0])))
    runs = (*runs, *_searched(study, models, folder, known))
    _check_unique(study, runs)
    return runs


def _searched(study: Study, models: Sequence[_Model], folder: Path, known: Mapping[str, str]) -> Iterator[Planned]:
    """Those that a search has added to the models."""
    preset = PRESETS[study.preset]()
    by_key = {(model.folder.resolve().name, model.seed): model for model in models}
    for number, entry in enumerate(study.searched, 1):
        if model := by_key.get((entry["model"], entry["seed"])):  # else of a study that cleaned more models
            where = f"search {number} of the study '{study.name}'"
            given = {flag: value for flag, value in entry.items() if flag not in ("model", "seed")}
            kinds = _dataclasses(study.preset, "clean", given, where)
            values = {flag: _checked(kinds, flag, value, where) for flag, value in given.items()}
            method = values.get("method", preset.clean.method)
            base = preset.defaults("clean", method, values.get("recipe", study.recipe))
            config = replace(base, **values, seed=model.seed, run=model.folder, save_every=0)
            name = f"{model.name}-{method}-search{number}"
            yield _planned(config, name, folder, known, start=(model.identity,), needs=model.needs)


def _pretraining(study: Study, folder: Path, known: Mapping[str, str]) -> tuple[list[Planned], list[_Model]]:
    """Plans and pre-trainings, seed by seed."""
    preset, given = PRESETS[study.preset](), settings(study, "pretrain")
    base = preset.pretrain
    given = [{"objective": base.objective, **values} for values in given]
    attacks = settings(study, "attacks")
    several = len({values.get("data", base.data) for values in given}) > 1
    attacked = zip(attacks or [None], _names(attacks) or [""], strict=True)
    grid = list(product(attacked, zip(given, _names(given), strict=True)))
    plans: dict[str, Planned] = {}
    runs, models = [], []
    for seed, (place, ((attack, attack_name), (values, name))) in product(study.seeds, enumerate(grid)):
        defaults = preset.defaults("pretrain", values.get("robust"), values.get("recipe", study.recipe))
        config, plan = replace(defaults, **values, seed=seed), ()
        _check_inputs(study, config)
        if attack is not None:
            poison = _poison(config.data, attack)
            of = f"-{poison.data.stem}" if several else ""
            planned = _planned(poison, f"{attack_name or 'plan'}{of}", folder, known)
            config, plan = replace(config, plan=planned.out), (planned.id,)
            plans[planned.id] = planned
        name = "-".join(filter(None, (attack_name if len(attacks) > 1 else "", name, f"s{seed}")))
        run = _planned(config, name, folder, known, start=plan, needs=plan)
        runs.append(run)
        models.append(_Model(place, seed, run.name, run.out, run.id, (run.id,)))
    if len(plans) < len(attacks):
        raise UserError(f"two attacks of the study '{study.name}' are the same; leave one out.")
    return [*plans.values(), *runs], models


def _pretrained(study: Study) -> list[_Model]:
    models = []
    for seed, (place, path) in product(study.seeds, enumerate(study.pretrained)):
        read_config(path)  # says what is wrong when it is no run folder
        fingerprint = _hash((path / "config.json").read_text())
        models.append(_Model(place, seed, f"{path.resolve().name}-s{seed}", path, fingerprint, ()))
    return models


def _poison(data: str, attack: dict[str, Any]) -> PoisonConfig:
    if data != "demo":
        return PoisonConfig(data=Path(data), **attack)
    size = {"rate": None} if "count" in attack else {}
    return PoisonConfig(**{"data": Path("demo"), **DEMO_ATTACK, **size, **attack})


def _planned(
    config: Config,
    name: str,
    folder: Path,
    known: Mapping[str, str],
    start: tuple[str, ...] = (),
    needs: tuple[str, ...] = (),
) -> Planned:
    """`start` identifies what the run starts from."""
    verb = _verb(type(config))
    told = material(config)
    if verb == "pretrain" and start:
        told.pop("plan")  # known by its id, as its path is the folder's
    if verb == "poison" and told["data"] == Path("demo"):
        told["data"] = DEMO_DATA
    run_id = _hash(json.dumps([verb, told, start], sort_keys=True, default=str))
    name = known.get(run_id, name)
    out = folder / "plans" / f"{name}.poison.json" if verb == "poison" else folder / "runs" / name
    return Planned(id=run_id, verb=verb, config=replace(config, out=out), needs=needs, name=name)


def material(config: Config) -> dict[str, Any]:
    """The flags that make the result what it is; no defaults, so that a flag that is new makes no other run of it."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    told = {flag: v for flag, v in vars(config).items() if not flags_of(type(config))[flag].immaterial}
    return {flag: v for flag, v in told.items() if v != defaults[flag]}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_inputs(study: Study, config: PretrainConfig) -> None:
    if config.data == "demo":
        return
    if config.eval_data is None:
        raise UserError(f"the study '{study.name}' measures top-1 and ASR: give --eval-data, a labelled .beton.")
    if config.plan is None and not study.attacks:
        raise UserError(f"the study '{study.name}' on {config.data} has no backdoor: give --plan, made by poison.")
    if config.plan is not None and study.attacks:
        raise UserError(f"the study '{study.name}' has attacks and a plan; leave one out.")


def _check_unique(study: Study, runs: Iterable[Planned]) -> None:
    ids: dict[str, str] = {}
    names: set[tuple[bool, str]] = set()
    for run in runs:
        if run.id in ids:
            raise UserError(f"the study '{study.name}' has the same run twice, as {ids[run.id]} and {run.name}.")
        key = (run.verb == "poison", run.name)
        if key in names:
            raise UserError(f"two runs of the study '{study.name}' would be called {run.name}; rename a folder.")
        ids[run.id] = run.name
        names.add(key)


def settings(study: Study, kind: str) -> list[dict[str, Any]]:
    """The products of the study's entries of a kind, each value checked against the flag's type."""
    found = []
    for number, entry in enumerate(getattr(study, kind), 1):
        where = f"entry {number} of {kind} in the study '{study.name}'"
        if not isinstance(entry, Mapping):
            raise UserError(f"{where} is {entry!r}: give flags with their values.")
        kinds = _dataclasses(study.preset, kind, entry, where)
        axes = {}
        for flag, value in entry.items():
            values = value if _is_axis(kinds, flag, value) else (value,)
            if not values:
                raise UserError(f"{where} has no value for '{flag}'; give one, or leave the flag out.")
            axes[flag] = [_checked(kinds, flag, value, where) for value in values]
        found += [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    return found


def _dataclasses(preset: str, kind: str, entry: Entry, where: str) -> list[type]:
    """The dataclasses of the flags of an entry, one for each method, or defence, that it names."""
    shared = KINDS[kind]
    if (chooser := CHOOSERS.get(shared)) is None:
        return [shared]
    names = entry.get(chooser, getattr(getattr(PRESETS[preset](), kind), chooser))
    try:
        return [config_of(shared, str(name)) for name in (names if isinstance(names, tuple | list) else [names])]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _is_axis(kinds: Sequence[type], flag: str, value: Any) -> bool:
    """Whether these are several values of the flag; of one that takes a list they are lists themselves."""
    if not isinstance(value, tuple | list):
        return False
    takes_list = any(typing.get_origin(types_of(kind).get(flag)) is tuple for kind in kinds)
    return not takes_list or any(isinstance(item, tuple | list) for item in value)


def _checked(kinds: Sequence[type], flag: str, value: Any, where: str) -> Any:
    """The value of a flag that each of the dataclasses must have, as its type."""
    for kind in kinds:
        value = _checked_in(kind, flag, value, where)
    return value


def _checked_in(kind: type, flag: str, value: Any, where: str) -> Any:
    hints, verb = types_of(kind), _verb(kind)
    if flag not in hints:
        chooser = {"clean": "method", "pretrain": "robust"}.get(verb)
        if chooser and (others := owners(chooser, flag)):
            raise UserError(f"{where} has the flag '{flag}', which only {chooser} {' or '.join(others)} has.")
        raise UserError(f"{where} has the flag '{flag}', which {verb} has not{nearest(flag, hints)}")
    mark = flags_of(kind)[flag]
    if verb in mark.set_by_study:
        raise UserError(f"{where} gives '{flag}', which the study itself sets; leave it out.")
    try:
        value = typed(hints[flag], value)
        if mark.choice and value not in (None, "none"):
            check(mark.choice, value)
    except TypeError as error:
        raise UserError(f"{where} has {flag} = {value!r}; it must be {error}.") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if numbers := outside(kind, flag, value):
        raise UserError(f"{where} has {flag} = {value!r}; give {numbers}.")
    return value


def _verb(kind: type) -> Verb:
    return next(verb for shared, verb in VERBS.items() if issubclass(kind, shared))


def nearest(word: str, words: Collection[str]) -> str:
    """The end of a sentence about a word that is none of `words`."""
    near = difflib.get_close_matches(word, words, 1)
    few = f"; there are {', '.join(words)}." if len(words) < 20 else "."
    return f"; did you mean {near[0]}?" if near else few


def _names(given: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each, of the flags that it takes to tell them apart; "" for a single one with no title."""

    def words(flags: Iterable[str]) -> list[str]:
        return ["-".join(_word(flag, values[flag]) for flag in flags if flag in values) for values in given]

    flags = list(dict.fromkeys(flag for values in given for flag in values))
    for flag in reversed([flag for flag in flags if flag not in TITLES]):
        fewer = [kept for kept in flags if kept != flag]
        if len(set(words(fewer))) == len(given):
            flags = fewer
    return words(flags)


def _word(flag: str, value: Any) -> str:
    text = re.sub(r"[^\w.+-]+", "_", "_".join(map(str, value)) if isinstance(value, tuple) else str(value))
    if isinstance(value, bool):
        return flag if value else f"no_{flag}"
    return text if flag in TITLES else f"{flag}{text}"


def command(config: Config) -> str:
    """The command line that gives this config, with only the flags that it needs."""
    verb, words = _verb(type(config)), []
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    if not isinstance(config, PoisonConfig):
        preset = PRESETS[config.preset]()
        usual, chooser = getattr(preset, verb), CHOOSERS[KINDS[verb]]
        defaults = vars(preset.defaults(verb, getattr(config, chooser), config.recipe))
        defaults |= {chooser: getattr(usual, chooser)}
        for flag, otherwise in (("preset", "demo"), ("recipe", "corrected")):
            if (given := getattr(config, flag)) != _assumed(config, flag, otherwise):
                words += [f"--{flag}", given]
    for flag, value in vars(config).items():
        if value == defaults[flag]:
            continue
        name = flag.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(["python", "-m", "fastbd", verb, *words])


def _assumed(config: PretrainConfig | CleanConfig, flag: str, otherwise: str) -> str:
    """The preset, or the recipe, that the command line takes when none is given: that of the run to clean."""
    run = config.run if isinstance(config, CleanConfig) else None
    if run and (run / "config.json").is_file():
        return read_config(run)["config"].get(flag, otherwise)
    return otherwise
