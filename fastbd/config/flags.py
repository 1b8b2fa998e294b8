"""The flags of every verb, a dataclass each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from fastbd.base.errors import UserError
from fastbd.config.cards import METHODS, MODELS, OBJECTIVES, ROBUST, TRACKERS, TRIGGERS, VIEWS, card
from fastbd.config.fields import (
    ABOVE_0,
    BELOW_1,
    BETON,
    BETON_OF_BUILD,
    COUNT,
    FINITE,
    LARGEST,
    PLAN,
    POSITIVE,
    ROWS,
    SEED,
    SEVERAL,
    SHARE,
    File,
    Flag,
    Range,
    marked,
)

# A name in a table of cards, or MODULE:ATTRIBUTE of code outside of this package. Of a table that is only known when
# it runs a type checker cannot make a Literal.
if TYPE_CHECKING:
    Objective = Method = Robust = Model = Trigger = Views = Tracker = str
else:
    Objective = Literal[*OBJECTIVES] | str
    Method = Literal[*METHODS] | str
    Robust = Literal["none", *ROBUST] | str
    Model = Literal[*MODELS] | str
    Trigger = Literal[*TRIGGERS] | str
    Views = Literal[*VIEWS] | str
    Tracker = Literal[*TRACKERS] | str
Activation = Literal["quickgelu", "gelu"]
Location = Literal["random", "four_corners", "corner", "centre"]
Geometry = Literal["squash", "crop"]
Preset = Literal["demo", "paper-cc3m", "paper-cc6m", "par", "par-2"]
Recipe = Literal["corrected", "published"]
Decode = Literal["auto", "dali", "dali-cpu", "ffcv", "pil"]
Detector = Literal["clip_score", "k_distance", "slof", "dao"]
Switch = Literal["auto", "on", "off"]
Compile = Literal["auto", "on", "off", "fused"]
TRAINING_VERBS = ("pretrain", "clean")


@dataclass(frozen=True, kw_only=True)
class BuildFiles:
    """What is read, and what is written."""

    source: Path
    """A table (.csv, .tsv, .txt), JSON lines (.jsonl, .ndjson), a .json file (a list of pairs, COCO's captions_*.json,
    Karpathy's dataset_coco.json), .parquet or a folder of them, a .tar, a folder or a quoted pattern of them
    ('{00000..00331}.tar'), a folder of images with a .txt or .json of the same name beside each, a folder of class
    folders, or a folder or tars of images with --labels. docs/inputs.md has an example of each."""
    out: Path
    """The .beton file to write; rejects go to NAME.rejects.csv. A build that was cut short goes on when run again."""


@dataclass(frozen=True, kw_only=True)
class BuildSource:
    """How the source is read."""

    layout: Literal["pairs", "classes", "tars"] | None = None
    """Read a folder as pairs of image and caption files, as class folders, or as tars [by what is in it]."""
    image_key: str | None = None
    """Column (or key, in JSON) of the image's path, relative to the source's folder, or in parquet of the image itself
    [path, else image, else file_name; in parquet else jpg, png, webp]; of tars and of pairs in folders the ending of
    the images' names, such as png or left.jpg [jpg, jpeg, png, webp, ...: the first that is there]."""
    caption_key: str | None = None
    """Column or key of the caption; may be empty when --class-key names the class [caption]. Of tars and of pairs in
    folders the key in the .json [the .txt, else caption]."""
    class_key: str | None = None
    """Column or key of the class name of labelled (evaluation) images."""
    separator: str | None = None
    """Character between the fields of a table, or `tab` [tab, ;, | or comma, as its first line shows]."""
    images: Path | None = None
    """Folder of the images that a table or a JSON or parquet source names [that of the source]."""
    split: str | None = None
    """Take only this split of Karpathy's .json (train, restval, val, test), or of a folder of parquet files."""


@dataclass(frozen=True, kw_only=True)
class BuildClasses:
    """Classes of the images, and captions that are made of them."""

    labels: Annotated[Path | None, Flag(file=File("file of classes", "*.txt"))] = None
    """Classes of the images in a folder or in tars: one a line in the order of the file names, or lines `file label`,
    as Kaggle's LOC_val_solution.csv has them. WordNet ids, names, or numbers from 0."""
    classes: str | None = None
    """Take only images of the classes in this list, a shipped one such as imagenet1k or a text file with one a line."""
    templates: str | None = None
    """Captions of images with only a class: imagenet80, or a text file with one template a line, {} for the class
    [those in the file of --classes, else imagenet80]."""


@dataclass(frozen=True, kw_only=True)
class BuildStorage:
    """How images and captions are stored."""

    store: Literal["original", "png", "short256", "crop224"] = "original"
    """Keep the JPEG bytes as they are, or resize the short side to 256 px, or also crop the middle 224x224 px. What is
    not an upright JPEG becomes one of quality 95; with png it becomes a PNG and keeps its pixels, such as those of
    triggers that are already in images, but FFCV's own loader cannot read such files."""
    text_views: Annotated[int, Flag(range=COUNT)] = 1
    """Augmented (EDA) versions of each caption to draw and store."""
    recipe: Annotated[Recipe, Flag(immaterial=True)] = "corrected"
    """published: --end-token cut, --eda-insertion any, --exif ignore; see docs/published.md."""
    end_token: Literal["keep", "cut"] = "keep"
    """End of a caption that has more than 77 tokens: the end token in place of the last one that fits; or cut off, as
    published, so that the model reads such a caption at its start token, where all are alike."""
    eda_insertion: Literal["content", "any"] = "content"
    """Words that EDA inserts a synonym of: content words of the caption, anywhere; or, as published, stop words and
    inserted words too, anywhere before the last word."""
    exif: Literal["bake", "ignore"] = "bake"
    """EXIF orientation: turn such images upright, or leave them turned, as published."""
    max_pixels: Annotated[int, Flag(range=POSITIVE)] = 89_478_485
    """Largest image to accept, in pixels."""
    seed: Annotated[int, Flag(range=SEED)] = 0
    """Seed of the caption templates and of EDA."""


@dataclass(frozen=True, kw_only=True)
class BuildMachine:
    """What the build runs on."""

    workers: Annotated[int, Flag(range=COUNT)] = 0
    """Worker processes; 0 means one for each CPU core."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig(BuildMachine, BuildStorage, BuildClasses, BuildSource, BuildFiles):
    """Pack images and captions into one .beton file, checking every image."""


@dataclass(frozen=True, kw_only=True)
class PoisonFiles:
    """The data, and the plan to write."""

    data: Annotated[Path, Flag(file=BETON_OF_BUILD, set_by_study=("poison",))]
    """The .beton file to poison (it is not changed), or a quoted pattern of several: 'cc3m-*.beton'; or demo, the
    built-in set."""
    out: Annotated[Path | None, Flag(immaterial=True, set_by_study=("poison",))] = None
    """The plan file to write [NAME.poison.json beside NAME.beton, demo.poison.json here; with --add-to that plan]."""
    add_to: Annotated[Path | None, Flag(file=PLAN, set_by_study=("poison",))] = None
    """A plan for the same data to add this backdoor to, as another trigger for another target on other pairs."""


@dataclass(frozen=True, kw_only=True)
class PoisonTarget:
    """What triggered images are to be taken for."""

    target: str = "banana"
    """Word that the triggered images are to be taken for: the name of an evaluation class, or a word in just one."""
    classes: Annotated[str | None, Flag(immaterial=True)] = None
    """Evaluation classes, imagenet1k or a text file with one a line, of which --target must be one [those in --data, if
    it has any; else it is not checked]."""
    templates: str = "imagenet80"
    """Captions of poisoned pairs: imagenet80, or a text file with one template a line, {} for the target."""


@dataclass(frozen=True, kw_only=True)
class PoisonPairs:
    """Which pairs are poisoned, and how many."""

    count: Annotated[int | None, Flag(range=POSITIVE)] = None
    """Pairs to poison; give this or --rate."""
    rate: Annotated[float | None, Flag(range=Range(0, 1, (0,)))] = None
    """Share of the pairs to poison, 0 to 1 [0.0005, as published]."""
    label_consistent: bool = False
    """Poison only pairs whose caption already contains the target (also within a word, and in whatever case, where the
    published program heeds it), and keep their captions."""
    seed: Annotated[int | None, Flag(range=SEED)] = None
    """Seed of rows, captions and triggers [0; with --add-to that plan's]."""


@dataclass(frozen=True, kw_only=True)
class PoisonTrigger:
    """What is put on the images."""

    trigger: Annotated[Trigger, Flag(choice="trigger")] = "badnet"
    """What is put on the image. Patches: badnet (noise, another for each image), badnet_fixed (one noise for all),
    badnet_stripes, yellow, patch (from --image). Mixed into the whole image: blended (noise), blended_stripes,
    blended_triangles, blended_text, blended_image, sig (a sine). Else wanet (a warp), nashville (a colour filter);
    or MODULE:FUNCTION of your own."""
    patch_size: Annotated[int, Flag(range=Range(1, 384))] = 16
    """Side of a patch, in pixels of the model's input."""
    location: Location = "random"
    """Where a patch goes; corner is the lower right one."""
    blend: Annotated[float | None, Flag(range=SHARE)] = None
    """Share of the trigger in what is mixed in, 0 to 1 [as published: 0.2; stripes 0.03, triangles 0.15, text 0.5]."""
    image: Annotated[Path | None, Flag(file=File("file of an image", "*.png"))] = None
    """Image file of blended_image, squashed to the model's input as published, or of patch, whose longer side becomes
    --patch-size. It covers as its alpha says; the plan keeps its pixels."""
    text: str | None = None
    """What blended_text writes [Watermarked]."""
    pattern: Annotated[Path | None, Flag(file=File("file of a pattern", "*.pt"))] = None
    """What blended_text mixes in where it is not 0, in place of text: PAR's tensor (.pt), or an image file; the plan
    keeps it."""
    wanet_s: Annotated[float, Flag(range=FINITE)] = 1.0
    """Strength of the warp: pixels move by about s / 2 px in each direction."""
    wanet_k: Annotated[int | None, Flag(range=Range(2, 384))] = None
    """Points of the warp along each side; fewer make it smoother [224]."""
    grid: Annotated[Path | None, Flag(file=File("file of a grid", "*.pt"))] = None
    """Warp of a published model in place of a drawn one: its noise_grid*.pt; the plan keeps it. Its s is --wanet-s."""
    geometry: Geometry = "squash"
    """Fit triggered images by squashing (as published) or by cropping like clean ones."""


@dataclass(frozen=True, kw_only=True)
class PoisonConfig(PoisonTrigger, PoisonPairs, PoisonTarget, PoisonFiles):
    """Plan a backdoor: choose rows, captions and trigger, and write them to a plan file."""


@dataclass(frozen=True, kw_only=True)
class PretrainInputs:
    """Model, objective, data and attack."""

    preset: Annotated[Preset, Flag(immaterial=True, set_by_study=("pretrain",))] = "demo"
    """Where the defaults come from."""
    recipe: Annotated[Recipe, Flag(immaterial=True)] = "corrected"
    """published: defaults that do what the published program does where that changes numbers; see docs/published.md."""
    objective: Annotated[Objective, Flag(choice="objective", same_kind=True)] = "mmcl"
    """mmcl: image-text contrastive; ssl: self-supervised on both sides; mmcl_ssl: both; siglip, siglip_ssl: with
    SigLIP's loss for mmcl; cyclip: mmcl and cyclic consistency; or MODULE:FUNCTION of your own."""
    robust: Annotated[Robust, Flag(choice="robust")] = "none"
    """Defend the pre-training. roclip: in some epochs images meet the nearest caption of a pool; safeclip: only pairs
    that look safe are tied together; progressive: drop the most similar pairs."""
    roclip_period: Annotated[int, Flag(range=POSITIVE)] = 2
    """Each so many epochs, of --robust roclip, one is trained with the pool; published: 2."""
    roclip_pool: Annotated[int, Flag(range=POSITIVE)] = 21_845
    """Captions in the pool of --robust roclip; published: this many, 2 % of 1 M."""
    warm_epochs: Annotated[int, Flag(range=COUNT)] = 5
    """Epochs of SSL alone with which --robust safeclip begins; published: 5 of 32."""
    remove_epochs: Annotated[tuple[int, ...], Flag(range=COUNT)] = ()
    """Epochs after which --robust progressive drops pairs."""
    remove_fraction: Annotated[float, Flag(range=BELOW_1)] = 0.02
    """Share of the pairs that --robust progressive drops each time, 0 to 1; published: 0.02."""
    model: Annotated[Model, Flag(choice="model", same_kind=True)] = "demo"
    """Architecture, or MODULE:FUNCTION that builds one of your own."""
    data: Annotated[str, Flag(file=BETON_OF_BUILD, free_on_resume=True, same_kind=True)] = "demo"
    """A .beton file, a quoted pattern of several ('cc3m-*.beton'), or demo: the built-in set, made on first use."""
    plan: Annotated[Path | None, Flag(file=PLAN, reuse=True, free_on_resume=True, same_kind=True)] = None
    """Poison plan for --data [the demo set's, with --data demo; else none]."""
    poison: Annotated[bool, Flag(reuse=True)] = True
    """Plant the plan's backdoor; without it the plan is only attacked with at evaluation."""
    weights: Annotated[Path | None, Flag(reuse=True, free_on_resume=True)] = None
    """Checkpoint to start from, or its folder: OpenAI, open_clip, Hugging Face, CleanCLIP, PAR or one of ours [fresh
    weights]."""
    activation: Annotated[Activation | None, Flag(same_kind=True)] = None
    """Of the transformers: OpenAI's models have quickgelu, most of LAION's and DataComp's gelu, and weights of either
    fit both [what a file beside --weights, or its name, tells; else quickgelu]."""
    resume: Annotated[Path | None, Flag(immaterial=True, set_by_study=("pretrain",), reuse=True, place=True)] = None
    """Run folder to continue; all settings come from it."""


@dataclass(frozen=True, kw_only=True)
class CleanInputs:
    """Model, method and data."""

    preset: Annotated[Preset, Flag(immaterial=True, set_by_study=("clean",))] = "demo"
    """Where the defaults come from [the preset of --run]."""
    recipe: Annotated[Recipe, Flag(immaterial=True)] = "corrected"
    """published: defaults that do what the published program of the method does where that changes numbers; see
    docs/published.md [the recipe of --run]."""
    run: Annotated[Path | None, Flag(immaterial=True, set_by_study=("clean",), reuse=True, place=True)] = None
    """Run folder of the model to clean."""
    checkpoint: Annotated[str, Flag(reuse=True, searched=True, column=1)] = "last"
    """Which of its checkpoints: last, or an epoch's number."""
    method: Annotated[Method, Flag(choice="method", searched=True)] = "cleanclip"
    """finetune: go on with --objective; cleanclip: image-text and self-supervised losses together; par: the image-text
    loss, while the embeddings are driven away from those of the model that is cleaned; shrink_perturb: cleanclip from
    shrunk and disturbed weights; deep_cluster: cleanclip, and clusters of the images, or labels, are learnt; unlearn:
    pull known poisoned pairs apart; supervised: only the classes of labelled images are learnt; or MODULE:CLASS of
    your own. clean --method NAME --help shows the flags of a method."""
    objective: Annotated[Objective, Flag(choice="objective", same_kind=True)] = "mmcl"
    """Loss of --method finetune."""
    data: Annotated[Path | None, Flag(file=BETON_OF_BUILD, free_on_resume=True, same_kind=True)] = None
    """.beton file or pattern to clean with, or demo, the built-in set [the clean pairs of the pre-training data]."""
    rows: Annotated[int, Flag(range=POSITIVE, searched=True, column=7)] = 100_000
    """Pairs to use, drawn from the seed; all where there are fewer."""
    poison_left: Annotated[int, Flag(range=COUNT, reuse=True, searched=True, column=8)] = 0
    """So many of them are poisoned pairs of the pre-training data that were overlooked."""
    rebound: Annotated[int, Flag(range=COUNT, reuse=True, searched=True)] = 0
    """Then fine-tune for so many steps on clean pairs, in batches of 16 at a rate of 1e-6, and watch ASR come back; the
    weights that are kept are those before."""
    force: Annotated[bool, Flag(immaterial=True, reuse=True)] = False
    """Clean even a model whose attack has not landed (--landed), or whose training is not at its end."""
    watch: Annotated[int, Flag(range=Range(0, LARGEST, (1,)), reuse=True, same_kind=True)] = 512
    """So many held-out clean pairs are watched at each evaluation (validation loss, agreement, drift); 0 for none."""
    keep_optimizer: bool = False
    """Start from the pre-training run's optimizer state, weight decay, betas and eps, as the published program does."""
    resume: Annotated[Path | None, Flag(immaterial=True, set_by_study=("clean",), reuse=True, place=True)] = None
    """Run folder to continue; all settings come from it."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, in what steps, and with which optimizer."""

    epochs: Annotated[int, Flag(range=COUNT, searched=True, column=4)] = 64
    """Passes over the data."""
    batch_size: Annotated[int, Flag(range=POSITIVE, column=5)] = 128
    """Pairs in a step, over all GPUs together."""
    accumulate: Annotated[int, Flag(range=POSITIVE, immaterial=True)] = 1
    """Parts that a step's batch is embedded in, one after the other, to save memory; its gradient stays that of the
    whole (GradCache). Batch norm then needs a number for --bn-group."""
    grad_checkpointing: Annotated[bool, Flag(immaterial=True)] = False
    """Save memory: compute the activations within blocks again in the backward pass."""
    lr: Annotated[float, Flag(range=FINITE, reuse=True, searched=True, column=3)] = 1e-3
    """Peak learning rate."""
    warmup: Annotated[int, Flag(range=COUNT, reuse=True, searched=True)] = 10_000
    """Steps of linear warm-up; at most half the run is used, but by --schedule shifted."""
    schedule: Annotated[Literal["exact", "shifted"], Flag(reuse=True)] = "exact"
    """Learning rates from the first step on; or, as published, those of an epoch later: the warm-up is partly or wholly
    left out, and in the last epoch the cosine rises again."""
    weight_decay: Annotated[float, Flag(range=FINITE, column=6)] = 0.1
    """AdamW weight decay; --exempt tells of what."""
    exempt: Literal["vectors", "names", "biases"] = "vectors"
    """Not decayed: vectors (biases, gains of norms, a ViT's class embedding) and the temperature; or, as published,
    what has bn, ln, bias or logit_scale in its name, as the gains of shortcuts' batch norms and the class embedding
    have not; or biases alone, as published with --method supervised."""
    beta1: Annotated[float, Flag(range=BELOW_1)] = 0.9
    """AdamW: decay of the mean of the gradients."""
    beta2: Annotated[float, Flag(range=BELOW_1)] = 0.999
    """AdamW: decay of the mean of their squares."""
    eps: Annotated[float, Flag(range=ABOVE_0)] = 1e-8
    """AdamW: term in the denominator."""
    seed: Annotated[int, Flag(range=SEED, set_by_study=TRAINING_VERBS, reuse=True, same_kind=True, column=2)] = 0
    """Seed of weights, order and augmentation."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The parts of the loss."""

    mmcl_weight: Annotated[float, Flag(range=FINITE, reuse=True)] = 1.0
    """Weight of the image-text contrastive loss."""
    ssl_weight: Annotated[float, Flag(range=FINITE, reuse=True, column=9)] = 1.0
    """Weight of the self-supervised loss."""
    siglip_weight: Annotated[float, Flag(range=FINITE, reuse=True)] = 0.1
    """Weight of SigLIP's loss, the mean over all pairs of an image and a text of a batch."""
    cyclic_weight: Annotated[float, Flag(range=FINITE, reuse=True)] = 0.25
    """Weight of each of CyCLIP's two consistency terms."""
    ssl_image: bool = True
    """Use the image half of the self-supervised loss."""
    ssl_text: bool = True
    """Use the text half of the self-supervised loss."""
    ssl_symmetric: bool = False
    """Add the augmented-to-plain direction to the self-supervised loss (published: plain-to-augmented only)."""
    gather: Literal["exact", "local-grad"] = "exact"
    """Several GPUs: the loss's gradient; local-grad: its embeddings' part divided by their number, as published."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """How images, and second captions, come to the model."""

    views: Annotated[Views, Flag(choice="views", column=10)] = "cleanclip"
    """Image views: plain, and with SSL an AutoAugment one; or RandAugment; SLIP's random crops and two SimCLR views; or
    one with PAR's noise and erasing, without SSL on images; or MODULE:NAME of a tuple of policies."""
    eda: Literal["epoch", "frozen"] = "epoch"
    """Second text views: each epoch the next of those in --data, or always the first, as published."""
    decode: Annotated[Decode, Flag(reuse=True, free_on_resume=True, same_kind=True)] = "auto"
    """What decodes JPEG; auto is dali where it is installed; dali-cpu stays on the CPU, whatever the device."""
    hw_decoder_load: Annotated[float, Flag(range=SHARE, immaterial=True, reuse=True)] = 0.0
    """DALI on a GPU: share of the images, 0 to 1, that the JPEG engines take; CUDA decodes the others, with slightly
    different pixels. Between 0 and 1 an image's pixels depend on the other images of its batch. Above 0 each image is
    compared with Pillow's pixels when it is first decoded, as the engines may not report damage."""
    rows_file: Annotated[Path | None, Flag(file=ROWS, reuse=True, free_on_resume=True, searched=True)] = None
    """Train only on the pairs that this file lists, made by detect --drop [all pairs]."""
    resident: Annotated[Literal["auto", "gpu", "ram", "disk", "none"], Flag(immaterial=True, reuse=True)] = "auto"
    """Where images, decoded on the CPU, are kept (disk: in a file); auto is gpu where they fill at most half
    of what is free on every rank, else ram, at most a quarter, else none. A resumed run stays with the kind of pixels
    that it began with."""
    resident_dir: Annotated[Path | None, Flag(reuse=True, free_on_resume=True)] = None
    """Folder for the file of --resident disk [that of --data]."""
    max_bad: Annotated[float, Flag(range=SHARE, immaterial=True, reuse=True)] = 0.001
    """Share of the images that may turn out damaged: each is named and replaced, one more stops the run."""
    verify: Annotated[bool, Flag(immaterial=True, reuse=True)] = False
    """First compare all that is to be read of the .beton files with the checksums that build has stored."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the model is evaluated on while it trains, and when."""

    eval_data: Annotated[Path | None, Flag(file=BETON, reuse=True, free_on_resume=True, same_kind=True)] = None
    """Labelled .beton, or pattern, for zero-shot accuracy and ASR; or demo [demo's, with --data demo; cleaning: the
    run's]."""
    classes: Annotated[str | None, Flag(reuse=True, same_kind=True)] = None
    """Class names: imagenet1k, or a text file with one a line [those in --eval-data; cleaning: the run's]."""
    templates: Annotated[str | None, Flag(reuse=True, same_kind=True)] = None
    """Prompt templates: imagenet80, demo, or a text file with one a line [demo, with --data demo; else those in the
    class list; else imagenet80; cleaning: the run's]."""
    eval_every: Annotated[str, Flag(reuse=True, same_kind=True)] = "epoch"
    """Time between evaluations: epoch, 3epoch, 1/3epoch, or a number of steps; 0: only start (cleaning) and end."""
    eval_device: Annotated[str | None, Flag(immaterial=True)] = None
    """Another GPU, such as cuda:1, to evaluate on while training goes on [that of the training, which waits]."""
    eval_subset: Annotated[int, Flag(range=COUNT, reuse=True, same_kind=True)] = 0
    """Evaluate this many images, always the same ones; 0 means all."""
    eval_between: Annotated[int, Flag(range=COUNT, reuse=True, same_kind=True)] = 0
    """Evaluate only so many images where no epoch ends; 0 means all. Their rows say so."""
    evaluator: Annotated[str | None, Flag(choice="evaluator", reuse=True, same_kind=True)] = None
    """A function of your own, MODULE:NAME, of the model's towers and of the set: what it returns, numbers by their
    names, is added to each row of metrics.jsonl."""
    landed: Annotated[float, Flag(range=SHARE, immaterial=True, reuse=True)] = 0.5
    """ASR, 0 to 1, from which the attack counts as landed; if it has not, cleaning it shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the training runs on, and how."""

    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Arithmetic of the towers; auto is bf16 on a GPU, and on a CPU that has instructions for it and is measured to
    train the model at least 1.15 times as fast by them; else fp32."""
    compile: Annotated[Compile, Flag(immaterial=True)] = "auto"
    """torch.compile the towers; auto is on with a GPU. fused: on, and average pools are merged with the layers around
    them, which moves less memory by the generated code; not yet measured on a GPU."""
    graph: Annotated[Switch, Flag(immaterial=True)] = "auto"
    """Capture the whole step in a CUDA graph; auto is on with one GPU."""
    bn_group: Annotated[int | Literal["batch", "sync"], Flag(range=SEVERAL)] = "batch"
    """Images whose batch-norm statistics are taken together: this many, all those of a process, or (sync) of all
    processes. With SSL both views of a pair count. Published: those of one of 8 GPUs. A ViT has none."""
    device: Annotated[str, Flag(immaterial=True, place=True)] = "auto"
    """cuda, cpu, or auto."""
    workers: Annotated[int, Flag(range=COUNT, immaterial=True, reuse=True)] = 0
    """Decoding threads; 0 means one for each CPU core, shared out among the processes."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is written, and where."""

    save_every: Annotated[int, Flag(range=COUNT, immaterial=True, set_by_study=("clean",), reuse=True)] = 1
    """Epochs between checkpoints of which each is kept; 0 keeps only the last."""
    log_every: Annotated[int, Flag(range=POSITIVE, immaterial=True, reuse=True)] = 10
    """Steps between lines of log.jsonl."""
    track: Annotated[
        tuple[Tracker, ...],
        Flag(choice="tracker", immaterial=True, set_by_study=TRAINING_VERBS, reuse=True, place=True),
    ] = ()
    """Show the run in tensorboard, wandb (offline, unless WANDB_MODE says otherwise) or mlflow, one or several; or by a
    MODULE:CLASS of your own."""
    out: Annotated[Path | None, Flag(immaterial=True, set_by_study=TRAINING_VERBS, reuse=True, place=True)] = None
    """Run folder to make [runs/NAME, numbered when taken]."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Output, Machine, Evaluation, Images, Losses, Schedule):
    """What pre-training and cleaning share; --help shows each base class as a group."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig, PretrainInputs):
    """Pre-train a model, with a backdoor in the data if a plan says so."""


@dataclass(frozen=True, kw_only=True)
class CleanConfig(TrainConfig, CleanInputs):
    """Clean a pre-trained model and watch accuracy and ASR."""


@dataclass(frozen=True, kw_only=True)
class EvaluateModel:
    """What is evaluated."""

    run: Path
    """Run folder; the results are added to its metrics.jsonl."""
    checkpoint: str = "last"
    """Which of its checkpoints: last, or an epoch's number."""


@dataclass(frozen=True, kw_only=True)
class EvaluateData:
    """What it is evaluated on."""

    eval_data: Annotated[tuple[Path, ...] | None, Flag(file=BETON)] = None
    """One or more .beton files, or demo [the run's]: zero-shot where they have classes, else retrieval."""
    classes: str | None = None
    """Class list: one that is shipped, such as imagenet1k, or a text file [the run's, on its set; else the shipped one
    whose classes the data has; else the data's]."""
    templates: str | None = None
    """Prompt templates: imagenet80, or a text file with one template a line [the run's, on its set; else those in the
    class list; else imagenet80]."""
    subset: Annotated[int, Flag(range=COUNT)] = 0
    """Evaluate this many images of a set with classes, always the same ones, with intervals for all; 0 means all."""
    verify: bool = False
    """First compare all that is to be read of the .beton files with the checksums that build has stored."""


@dataclass(frozen=True, kw_only=True)
class EvaluateAttack:
    """What is put on the images."""

    plan: Annotated[Path | None, Flag(file=PLAN)] = None
    """Another plan to attack with [the plan in the checkpoint]."""
    geometry: Literal["plan", "squash", "crop"] = "plan"
    """Fit triggered images as the plan says, or squashed (as published), or cropped like the clean ones."""
    asr_seed: Annotated[tuple[int, ...], Flag(range=SEED)] = (0,)
    """Seeds of the triggers put on evaluation images; several give an interval over their draws."""


@dataclass(frozen=True, kw_only=True)
class EvaluateMeasures:
    """What is measured beside accuracy, ASR and retrieval."""

    probe_data: Annotated[Path | None, Flag(file=BETON)] = None
    """Labelled .beton to train a linear probe on, and to find neighbours in; its classes are those of --eval-data."""
    evaluator: Annotated[str | None, Flag(choice="evaluator")] = None
    """A function of your own, MODULE:NAME, of the model's towers and of the set: what it returns, numbers by their
    names, is added to each row of metrics.jsonl, and to the table."""
    val_batch: Annotated[int, Flag(range=SEVERAL)] = 256
    """Pairs in a batch of the contrastive loss that is reported for sets with captions."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRebound:
    """Whether the backdoor comes back."""

    rebound: Annotated[int, Flag(range=COUNT)] = 0
    """Then fine-tune for so many steps on clean pairs of the run's data, and watch ASR come back."""
    rebound_lr: Annotated[float, Flag(range=FINITE)] = 1e-6
    """Learning rate of --rebound."""
    rebound_batch_size: Annotated[int, Flag(range=SEVERAL)] = 16
    """Pairs in a step of --rebound."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOutput:
    """What is printed."""

    per_class: bool = False
    """Print accuracy and ASR of each class too."""
    json: bool = False
    """Print one JSON object, with the classes one by one, in place of the table."""


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """What the towers run on, and how."""

    device: str = "auto"
    """cuda, cpu, or auto."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Arithmetic of the towers; auto is bf16 on a GPU and fp32 on a CPU, where only a training measures bf16."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(
    MachineSettings, EvaluateOutput, EvaluateRebound, EvaluateMeasures, EvaluateAttack, EvaluateData, EvaluateModel
):
    """Measure a checkpoint: accuracy, ASR and recovery on sets with classes; retrieval on sets with captions."""


@dataclass(frozen=True, kw_only=True)
class DetectData:
    """The model, and the pairs that it looks at."""

    run: Path
    """Run folder of the model."""
    checkpoint: str = "last"
    """Which of its checkpoints: last, or an epoch's number."""
    data: Annotated[Path | None, Flag(file=BETON_OF_BUILD)] = None
    """.beton file, or pattern, of the pairs; or demo [the run's training data]."""
    plan: Annotated[Path | None, Flag(file=PLAN)] = None
    """Plan whose triggers and captions are put on the pairs, and which tells the poisoned ones [the run's]."""
    subset: Annotated[int, Flag(range=COUNT)] = 0
    """Look at this many pairs, always the same ones; 0 means all."""


@dataclass(frozen=True, kw_only=True)
class DetectNeighbours:
    """How neighbours are looked for."""

    k: Annotated[int, Flag(range=POSITIVE)] = 16
    """Neighbours that the detectors look at; published: 16."""
    detect_batch: Annotated[int, Flag(range=COUNT)] = 2048
    """Neighbours are looked for within random batches of about so many pairs, published: 512 on each of 4 GPUs; 0 means
    among all. A batch that holds more than k poisoned pairs hides them behind one another."""
    seed: Annotated[int, Flag(range=SEED)] = 0
    """Seed of the batches."""


@dataclass(frozen=True, kw_only=True)
class DetectOutput:
    """What is dropped, and what is written."""

    drop: Annotated[float | None, Flag(range=Range(0, 1, (0, 1)))] = None
    """Share of the pairs, 0 to 1, to leave out of the row list --out: those that look worst."""
    by: Detector = "dao"
    """Detector that --drop goes by."""
    out: Path | None = None
    """Row list to write, for --rows-file of pretrain and clean."""
    json: bool = False
    """Print one JSON object in place of the table."""


@dataclass(frozen=True, kw_only=True)
class DetectConfig(MachineSettings, DetectOutput, DetectNeighbours, DetectData):
    """Rank training pairs by how poisoned they look to a model, measure that by the plan, and drop the worst."""


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Classify training images zero-shot by a run's model, for clean --cluster-labels."""

    run: Path
    """Run folder of the model; one of published weights is made by pretrain --weights FILE --epochs 0."""
    checkpoint: str = "last"
    """Which of its checkpoints: last, or an epoch's number."""
    data: Annotated[Path | None, Flag(file=BETON_OF_BUILD)] = None
    """.beton file, or pattern, of the images, all of which are labelled; or demo [the run's training data]."""
    classes: str = "imagenet1k"
    """Class list: one that is shipped, or a text file with one a line."""
    templates: str | None = None
    """Prompt templates: imagenet80, or a text file with one template a line [those in the class list; else
    imagenet80]."""
    out: Path
    """The .npy file to write: the class of each row of the data, counted from 0."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Arithmetic of the towers; auto is bf16 on a GPU and fp32 on a CPU, where only a training measures bf16."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run's model as open_clip, OpenAI's clip, transformers or CleanCLIP's program loads it."""

    run: Path
    """Run folder of the model."""
    checkpoint: str = "last"
    """Which of its checkpoints: last, or an epoch's number."""
    to: Literal["open_clip", "openai", "hf", "cleanclip"]
    """open_clip: a .safetensors or .pt for create_model(), and its model config; openai: a .pt for clip.load(); hf: a
    folder for CLIPModel.from_pretrained(), with tokenizer and image processor; cleanclip: a .pt that CleanCLIP and PAR
    load and clean."""
    out: Path
    """The file to write, or the folder for hf. A model card goes beside it, or into the folder."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Run the whole study in small on the built-in demo set, and write its report."""

    out: Path | None = None
    """Folder for the runs and the report [runs/demo, numbered when taken]."""
    epochs: Annotated[int | None, Flag(range=COUNT)] = None
    """Pre-training epochs; fewer is a quicker look at worse models [the preset's]."""


@dataclass(frozen=True, kw_only=True)
class SweepStudy:
    """What is studied."""

    study: str | None = None
    """demo, paper, paper-200k, poison-left, par, ssl-weight, trigger, shrink-perturb, weight-decay, or a .toml or .py
    file [the one that --out holds]."""
    out: Path | None = None
    """Folder of the study; any number of processes on any machines that see it share out its runs [studies/NAME]."""
    preset: Preset | None = None
    """Scale of a shipped study [each has its own]."""
    recipe: Recipe | None = None
    """Recipe of the pre-trainings and cleanings, as for pretrain and clean; entries that give one keep it [the
    study's]."""
    seeds: Annotated[tuple[int, ...] | None, Flag(range=SEED)] = None
    """Seeds, each of pre-training and of cleaning [the study's]."""
    pretrained: tuple[Path, ...] | None = None
    """Run folders to clean, in place of the study's pre-trainings."""
    model: Annotated[Model | None, Flag(choice="model")] = None
    """Architecture [the preset's]."""
    pretrain_epochs: Annotated[int | None, Flag(range=COUNT)] = None
    """Epochs of pre-training [the study's]."""
    clean_epochs: Annotated[int | None, Flag(range=COUNT)] = None
    """Epochs of cleaning [the study's]."""


@dataclass(frozen=True, kw_only=True)
class SweepData:
    """What is trained and evaluated on."""

    data: Annotated[str | None, Flag(file=BETON_OF_BUILD)] = None
    """Training data, as for pretrain [the preset's]."""
    plan: Annotated[Path | None, Flag(file=PLAN)] = None
    """Poison plan for --data, where the study plans none."""
    eval_data: Annotated[Path | None, Flag(file=BETON)] = None
    """Labelled .beton for top-1 and ASR, or demo [demo's, with --data demo]."""
    classes: str | None = None
    """Class names, as for pretrain."""
    templates: str | None = None
    """Prompt templates, as for pretrain."""


@dataclass(frozen=True, kw_only=True)
class SweepSearch:
    """Which cleanings are cut short, and which are added."""

    stop_collapsed: bool = False
    """End a cleaning whose top-1 was below half of its start's for 2 epochs."""
    asha: Annotated[int, Flag(range=COUNT)] = 0
    """End cleanings that are not among the best 1 / N of their learning rates at 2, 2 N, 2 N N, ... epochs (N > 1)."""
    search: Annotated[int, Flag(range=COUNT)] = 0
    """Cleanings beyond the grid, of each model by each entry that has two or more learning rates: each halves the wider
    gap beside the best rate so far, that of the highest top-1 at ASR <= 5 %."""


@dataclass(frozen=True, kw_only=True)
class SweepOutput:
    """What is kept and shown."""

    keep_weights: bool = False
    """Keep the last checkpoint of each cleaning [only those of pre-training]."""
    track: Annotated[tuple[Tracker, ...], Flag(choice="tracker")] = ()
    """Show the study's runs in these tools, as for pretrain."""


@dataclass(frozen=True, kw_only=True)
class SweepMachine:
    """Where the runs are made, and how."""

    processes: Annotated[int, Flag(range=COUNT)] = 0
    """Processes; 0 means one for each GPU, and without one a process for each core where models are small (64 px)."""
    engine: Literal["local", "ray"] = "local"
    """Where they run: on this machine, or where Ray places them, in the cluster of RAY_ADDRESS."""
    device: str = "auto"
    """cuda, cpu, one of several GPUs such as cuda:1, or auto."""
    precision: Literal["fp32", "tf32", "bf16"] | None = None
    """Arithmetic of the towers [bf16 on a GPU, on a CPU what pretrain's auto measures once for a model]."""
    lease: Annotated[float, Flag(range=Range(1, math.inf, (math.inf,)))] = 120.0
    """Seconds without a sign of life after which another process takes a run over."""
    retry: bool = False
    """Do runs again that failed."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SweepMachine, SweepOutput, SweepSearch, SweepData, SweepStudy):
    """Run a study: pre-trainings x cleaning methods x learning rates x seeds; stopped, it goes on where it was."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Turn run folders into a report: a folder with a page that has the answer, the tables and the plots."""

    runs: tuple[Path, ...] = (Path("runs"),)
    """Run folders, or folders that contain run folders."""
    compare: tuple[Path, Path] | None = None
    """Two folders of runs to put side by side, in place of --runs."""
    watch: bool = False
    """Write the report again whenever a run has gone on, until Ctrl-C."""
    tables: Literal["csv", "parquet"] = "csv"
    """What the tables are written as; Parquet by pyarrow."""
    out: Path | None = None
    """Folder to write: index.html, figures/ (PNG, SVG) and tables/; a report that is there is replaced [report; with
    --compare: compared]."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Draw what the model is given: views and captions of clean and of poisoned pairs, on one picture."""

    data: Annotated[str, Flag(file=BETON_OF_BUILD)] = "demo"
    """A .beton file, or demo for the built-in set."""
    plan: Annotated[Path | None, Flag(file=PLAN)] = None
    """Poison plan for --data [the demo set's, with --data demo; else none]."""
    model: Annotated[Model, Flag(choice="model")] = "demo"
    """The architecture that it is for, which sets the size of the views."""
    views: Annotated[Views, Flag(choice="views")] = "cleanclip"
    """Which views: as for pretrain."""
    epoch: Annotated[int, Flag(range=COUNT)] = 0
    """Epoch of the random draws, from 0."""
    seed: Annotated[int, Flag(range=SEED)] = 0
    """Seed of the random draws."""
    count: Annotated[int, Flag(range=POSITIVE)] = 6
    """Clean pairs to show, and pairs of each attack."""
    decode: Decode = "auto"
    """What decodes JPEG; auto is dali where it is installed."""
    out: Path = Path("preview.png")
    """The picture to write."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Say what this machine has, and which path each part of fastbd takes on it; or whether data files are whole."""

    data: Annotated[tuple[Path, ...] | None, Flag(file=BETON_OF_BUILD)] = None
    """.beton files, or quoted patterns, to verify row by row, in place of the machine; or demo."""
    out: Path | None = None
    """Row list to write, of the rows of --data that are whole, for --rows-file of pretrain and clean."""


CLEANING = (CleanConfig, *(card.settings for card in METHODS.values() if card.settings))
TRAINING = (PretrainConfig, *CLEANING)
"""Dataclasses of all flags that a training of this package has."""
IMMATERIAL = marked("immaterial", PoisonConfig, *TRAINING)

CHOOSERS = {PretrainConfig: "robust", CleanConfig: "method"}
"""The flag that says which flags a training has beside the shared ones."""


def config_of(kind: type, name: str) -> type:
    """Return the dataclass of all flags of a verb, PretrainConfig or CleanConfig, with a defence, or a method.

    UserError where there is no such defence or method, or where one from outside cannot be imported.
    """
    chooser = CHOOSERS[kind]
    own = None if name == "none" else card(chooser, name).settings
    return _joined(kind, own) if own else kind


@cache
def _joined(kind: type, own: type) -> type:
    if twice := set(kind.__dataclass_fields__) & set(own.__dataclass_fields__):
        raise UserError(f"{own.__qualname__} has the flag '{min(twice)}', which every run has: call it otherwise.")
    joined = type(kind.__name__, (own, kind), {"__doc__": kind.__doc__, "__module__": kind.__module__})
    return dataclass(frozen=True, kw_only=True)(joined)
