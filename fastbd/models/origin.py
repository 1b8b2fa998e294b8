"""What the weights themselves do not tell: the activation of the model that they were trained in, and its heads.

Weights that were trained with nn.GELU have the names and shapes of those trained with QuickGELU. Their config says it
where it lies beside them; else the name of the file may.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastbd.base.errors import UserError
from fastbd.base.files import read_json
from fastbd.models.layouts import Found

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's normalisation, which all images here get
HIDDEN_ACT = {"quick_gelu": "quickgelu", "gelu": "gelu"}
_WORDS = {
    "quickgelu": "quickgelu",
    "openai": "quickgelu",
    "metaclip": "quickgelu",
    "dfn2b-clip-vit-l-14-39b": "gelu",
    "dfn": "quickgelu",
    "vit_base_patch32_clip_224.laion400m": "quickgelu",
    "laion": "gelu",
    "datacomp": "gelu",
    "commonpool": "gelu",
}
"""Words of the names of published weights, the first that is in a name, and what open_clip's table says of these."""


class Origin(NamedTuple):
    """The activation that weights were trained with, why it is taken for that, and the heads."""

    activation: str
    why: str
    heads: tuple[int, int] | None = None
    """Attention heads of the image and of the text tower, where they are known."""


def origin(path: Path, tree: Mapping[Any, Any], found: Found) -> Origin:
    """Return what is known of the weights that were `found` in the `tree` of the file `path`."""
    if "fastbd" in tree:
        return Origin(tree["about"].get("activation", "quickgelu"), "as it records")
    if found.hugging_face and (config := _json(path.with_name("config.json"))):
        return _of_hugging_face(path.with_name("config.json"), config)
    own = _json(path.with_suffix(".json"))  # as open_clip.add_model_config() reads
    for beside, model in (
        ("open_clip_config.json", _json(path.with_name("open_clip_config.json")).get("model_cfg")),
        (path.with_suffix(".json").name, own if "vision_cfg" in own else None),
    ):
        if model:
            return Origin("quickgelu" if model.get("quick_gelu") else "gelu", f"as {beside} beside it says")
    if found.openai:
        return Origin("quickgelu", "as in OpenAI's layout")
    hub = next((part for part in path.parts if part.startswith("models--")), "")
    for name in (path.name, hub, str(tree.get("name", ""))):
        for word, activation in _WORDS.items():
            if word in name.lower():
                return Origin(activation, f"as its name says {word}")
        if "-model_" in name and "-lr_" in name:  # of open_clip's training program
            return Origin("gelu", f"as open_clip's model in {name} has it")
    return Origin("quickgelu", "as nothing tells, and OpenAI's models have it")


def other_mean(path: Path) -> list[float] | None:
    """Return the mean that the model's images were normalised by, if a config beside it says another than MEAN."""
    mean = _json(path.with_name("preprocessor_config.json")).get("image_mean")
    mean = mean or _json(path.with_name("open_clip_config.json")).get("preprocess_cfg", {}).get("mean")
    return mean if mean and max(abs(a - b) for a, b in zip(mean, MEAN, strict=True)) > 1e-3 else None


def _of_hugging_face(path: Path, config: dict) -> Origin:
    """Return what config.json says; it leaves out what is a default of transformers."""
    image, text = config.get("vision_config", {}), config.get("text_config", {})
    said = {tower.get("hidden_act", "quick_gelu") for tower in (image, text)}
    if len(said) > 1 or not said <= set(HIDDEN_ACT):
        raise UserError(
            f"has {path.name} beside it that says hidden_act {' and '.join(sorted(said))}: both towers must have "
            "quick_gelu, or both gelu"
        )
    heads = image.get("num_attention_heads", 12), text.get("num_attention_heads", 8)
    return Origin(HIDDEN_ACT[said.pop()], "as config.json beside it says", heads)


def _json(path: Path) -> dict:
    try:
        found = read_json(path, "mend it, or move the weights into a folder of their own")
    except (OSError, UserError):
        return {}
    return found if isinstance(found, dict) else {}
