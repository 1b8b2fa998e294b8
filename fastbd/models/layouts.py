"""Names that other programs give to the weights of a dual encoder, and the names in this one, which are OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbd.base.errors import UserError

RAW = ("state_dict", "model", "model_state_dict", "module", "net")
AVERAGED = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict")
DEPTH = 8  # of such keys within one another; a pickle can hold itself
_WRAPPERS = {"module", "model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DERIVED = {"input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids", "n_averaged"}

_HUGGING_FACE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_projection.weight": "text_projection",
}
"""How names of CLIPModel's weights begin, and how ours do."""
_IN_BLOCKS = {
    ".self_attn.": ".attn.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
"""How they go on within a block."""
_TRANSPOSED = ("visual.proj", "text_projection")


class Found(NamedTuple):
    """Weights by the names of CLIP's parameters and buffers, and how they were found."""

    tensors: dict[str, Tensor]
    hugging_face: bool
    openai: bool
    """Whether they have the sizes beside them that OpenAI's own files have."""
    notes: tuple[str, ...]
    """Choices that were made, each a clause."""


def weights_in(tree: Mapping[Any, Any]) -> Found:
    """Return the weights in a checkpoint. UserError where several models are in it, or a weight is there twice."""
    state, notes = _state_dict(tree)
    tensors, note = _without_prefix(_plain(state))
    openai = "input_resolution" in tensors
    tensors = {name: tensor for name, tensor in tensors.items() if not _DERIVED.intersection(name.split("."))}
    hugging_face = any(name.startswith(("vision_model.", "text_model.")) for name in tensors)
    if hugging_face:
        tensors = _from_hugging_face(tensors)
    else:
        tensors = _renamed(tensors, lambda name: name.removeprefix("text."))  # open_clip's CustomTextCLIP
    return Found(tensors, hugging_face, openai, (*notes, *note))


def _state_dict(tree: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], tuple[str, ...]]:
    """Return the state dict in a checkpoint that also holds an optimizer and the like; and choices that were made."""
    notes = ()
    for _ in range(DEPTH):
        raw, averaged = ([key for key in keys if isinstance(tree.get(key), Mapping)] for keys in (RAW, AVERAGED))
        if not raw and not averaged:
            return tree, notes
        if averaged:
            notes = (_chosen(raw[0] if raw else None, averaged[0]),)
        tree = tree[(raw or averaged)[0]]
    raise ValueError("a checkpoint within itself")


def _chosen(raw: str | None, averaged: str) -> str:
    if raw is None:
        return f"the averaged weights '{averaged}' are taken, as there are no others"
    return f"the weights{raw and f' {raw!r}'} are taken, not the averaged ones '{averaged}'"


def _plain(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors in ordinary memory, by their names without what DDP, torch.compile and the like put in."""
    tensors = {str(name): value for name, value in state.items() if _is_plain(value)}
    return _renamed(tensors, lambda name: ".".join(part for part in name.split(".") if part not in _WRAPPERS))


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _renamed(tensors: dict[str, Tensor], rename) -> dict[str, Tensor]:
    names: dict[str, str] = {}
    for name in tensors:
        other = names.setdefault(rename(name), name)
        if other != name:
            raise UserError(f"holds {rename(name)} twice, as {other} and as {name}: save the state dict of one model")
    return {new: tensors[name] for new, name in names.items()}


def _without_prefix(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of the module that holds the temperature, by their names in it; and choices that were made.

    A Lightning module has the model under a name of its own, perhaps an averaged copy under another, and a loss.
    """
    prefixes = [n.removesuffix("logit_scale") for n in tensors if n == "logit_scale" or n.endswith(".logit_scale")]
    averaged = [prefix for prefix in prefixes if set(prefix.split(".")).intersection(AVERAGED)]
    raw = [prefix for prefix in prefixes if prefix not in averaged]
    if len(raw or averaged) > 1:
        raise UserError(f"holds several models, {' and '.join(map(repr, raw or averaged))}: save the weights of one")
    (prefix,) = raw or averaged or [""]
    notes = (_chosen(prefix.rstrip(".") if raw else None, averaged[0].rstrip(".")),) if averaged else ()
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not prefix:
        inside = {name: tensor for name, tensor in inside.items() if name.split(".")[0] not in AVERAGED}
    return inside, notes


def _from_hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return CLIPModel's weights by OpenAI's names; queries, keys and values are apart in it."""
    found = _renamed(tensors, lambda name: _translated(name, _HUGGING_FACE, _IN_BLOCKS))
    for name in _TRANSPOSED:
        if name in found:
            found[name] = found[name].T
    for query in [name for name in found if ".attn.q_proj." in name]:
        parts = [query.replace("q_proj", f"{x}_proj") for x in "qkv"]
        if all(part in found for part in parts):
            found[query.replace("q_proj.", "in_proj_")] = torch.cat([found.pop(part) for part in parts])
    return found


def hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a CLIP with a vision transformer by the names that CLIPModel has for them."""
    apart = {}
    for name, tensor in tensors.items():
        if ".attn.in_proj_" in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            apart |= {name.replace("in_proj_", f"{x}_proj."): part for x, part in parts}
        else:
            apart[name] = tensor.T if name in _TRANSPOSED else tensor
    starts, within = ({ours: theirs for theirs, ours in table.items()} for table in (_HUGGING_FACE, _IN_BLOCKS))
    return {_translated(name, starts, within): tensor for name, tensor in apart.items()}


def _translated(name: str, starts: Mapping[str, str], within: Mapping[str, str]) -> str:
    """Return a name with its start, and each part within it, replaced as the tables say."""
    start = next((start for start in starts if name.startswith(start)), "")
    name = starts.get(start, "") + name.removeprefix(start)
    for before, after in within.items():
        name = name.replace(before, after)
    return name
