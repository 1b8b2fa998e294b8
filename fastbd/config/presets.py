"""The presets: defaults of both training verbs, for the built-in set and for the scales of the papers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fastbd.config.flags import CHOOSERS, CleanConfig, PretrainConfig, config_of
from fastbd.config.recipes import published


@dataclass(frozen=True)
class Settings:
    """A preset: the defaults of both training verbs."""

    pretrain: PretrainConfig
    clean: CleanConfig
    methods: dict[str, dict] = dataclasses.field(default_factory=dict)
    """What cleaning methods do not share with `clean`."""

    def defaults(self, verb: str, name: str | None = None, recipe: str = "corrected"):
        """Of a training verb: of pre-training with a defence, of cleaning with a method (None: the usual one).

        They have the flags of their own too. UserError where there is no such defence or method, or none of the recipe.
        """
        shared = self.pretrain if verb == "pretrain" else self.clean
        chooser = CHOOSERS[type(shared)]
        name = name or str(getattr(shared, chooser))
        own = self.methods.get(name, {}) if verb == "clean" else {}
        if recipe == "published":
            own = own | published(verb, name, shared.preset)
        return config_of(type(shared), name)(**vars(shared) | own | {chooser: name, "recipe": recipe})


PAR = dict(views="par", weight_decay=1e-4, beta2=0.98)
"""What --method par has of its own in every preset: as published."""


def demo() -> Settings:
    """The built-in demo set and a tiny CLIP-shaped ResNet at 64 px; minutes on 2 CPU cores.

    python -m fastbd pretrain --objective mmcl_ssl
    python -m fastbd clean --run runs/mmcl_ssl --method cleanclip

    8 % of 4,000 pairs carry the backdoor: small data needs a higher rate than the published 0.05 % to learn one.
    """
    return Settings(
        PretrainConfig(
            preset="demo",
            batch_size=64,
            beta2=0.98,
            warmup=50,
            epochs=12,
            lr=2e-3,
            eval_every="3epoch",
            save_every=0,
            roclip_pool=128,
            warm_epochs=2,
            remove_epochs=(3, 6, 9),
        ),
        CleanConfig(preset="demo", batch_size=64, beta2=0.98, warmup=50, epochs=4, lr=1e-3, rows=2_000, save_every=0),
        {
            "par": PAR | dict(lr=1e-4, frozen_norms=False),
            "unlearn": dict(flagged=100),
            "deep_cluster": dict(clusters=50),
            "supervised": dict(lr=3e-3, weight_decay=0.01),
        },
    )


def paper_cc3m() -> Settings:
    """CLIP RN50 on CC3M with 1,500 BadNet pairs (Verma et al., arXiv 2311.14948).

    python -m fastbd pretrain --preset paper-cc3m --plan cc3m.poison.json --eval-data imagenet-val.beton
    python -m fastbd clean --run runs/mmcl --lr 1e-4

    Cost: 64 epochs of 3 M pairs at a global batch of 2,048 (MMCL; give --batch-size 1024 for MMCL+SSL); each
    cleaning is 20 epochs of 100,000 pairs, and the paper sweeps 8 to 14 learning rates from 1e-7 to 7e-3 for each
    model: one rate alone reproduces nothing. Published top-1 / ASR before cleaning: MMCL 16.00 / 99.88 %, MMCL+SSL
    17.04 / 99.03 %; best top-1 at ASR <= 5 % after CleanCLIP: 16.49 % and 14.16 %.
    """
    return Settings(
        PretrainConfig(preset="paper-cc3m", model="rn50", data="cc3m.beton", classes="imagenet1k", batch_size=2048),
        CleanConfig(preset="paper-cc3m", epochs=20, batch_size=64, lr=1e-4, warmup=50, eval_every="1/3epoch"),
        {
            "par": PAR,
            "deep_cluster": dict(epochs=10),
            "supervised": dict(epochs=10, batch_size=80, warmup=500, weight_decay=0.01),
        },  # fmt: skip
    )


def paper_cc6m() -> Settings:
    """CLIP RN50 on CC6M with 3,000 BadNet pairs (Verma et al., arXiv 2311.14948).

    python -m fastbd pretrain --preset paper-cc6m --plan cc6m.poison.json --eval-data imagenet-val.beton
    python -m fastbd clean --run runs/mmcl --checkpoint 21 --lr 1e-4

    Cost: as paper-cc3m with 6 M pairs; the published models are epoch 21 (MMCL) and 36 (MMCL+SSL, --batch-size
    1024) of a 64-epoch schedule. Published top-1 / ASR before cleaning: 23.76 / 99.98 % and 23.86 / 99.45 %; best
    top-1 at ASR <= 5 % after CleanCLIP: 24.04 % and 13.05 %.
    """
    cc3m = paper_cc3m()
    return Settings(
        dataclasses.replace(cc3m.pretrain, preset="paper-cc6m", data="cc6m.beton"),
        dataclasses.replace(cc3m.clean, preset="paper-cc6m"),
        cc3m.methods,
    )


def par() -> Settings:
    """OpenAI's CLIP RN50, poisoned by fine-tuning and cleaned with PAR (arXiv 2412.00727).

    python -m fastbd pretrain --preset par --plan cc3m-500k.poison.json --eval-data imagenet-val.beton
    python -m fastbd clean --run runs/mmcl --data cc3m-250k.beton

    Poisoned as by CleanCLIP's authors (arXiv 2303.03323): 5 epochs of 500,000 pairs of CC3M, 1,500 of them poisoned.
    Cost of cleaning: 10 epochs of 250,000 pairs, the defaults of the released program; preset par-2 is its script with
    2. PAR's authors keep one --tau for all attacks; a lower one is gentler on the accuracy and on the backdoor.
    """
    return Settings(
        PretrainConfig(
            preset="par", model="rn50", data="cc3m-500k.beton", weights=Path("RN50.pt"), classes="imagenet1k", epochs=5,
            lr=1e-6, warmup=50,
        ),
        CleanConfig(preset="par", method="par", epochs=10, rows=250_000, batch_size=256, lr=3e-6, warmup=50),
        {"par": PAR},
    )  # fmt: skip


def par_2() -> Settings:
    """Preset par with the cleaning of PAR's released script: 2 epochs at a global batch of 2,048, 244 steps.

    python -m fastbd pretrain --preset par --plan cc3m-500k.poison.json --eval-data imagenet-val.beton
    python -m fastbd clean --preset par-2 --run runs/mmcl --data cc3m-250k.beton

    Its 4 processes of 512 pairs do not average their gradients, and the first one's model is kept; here they do, so
    expect other numbers than the published ones.
    """
    ten = par()
    return Settings(
        dataclasses.replace(ten.pretrain, preset="par-2"),
        dataclasses.replace(ten.clean, preset="par-2", epochs=2, batch_size=2048),
        ten.methods,
    )


PRESETS = {"demo": demo, "paper-cc3m": paper_cc3m, "paper-cc6m": paper_cc6m, "par": par, "par-2": par_2}
