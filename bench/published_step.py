"""A training step as published programs do it, in our words, on the weights of one of our models.

CleanCLIP (Bansal et al., ICCV 2023): float32, NCHW, always 77 tokens. open_clip (Ilharco et al.): bf16 autocast, and
the step through torch.compile. Both run OpenAI's wiring of the towers: attention over sequences laid [L, B, width]
under an additive mask, and an attention pool that answers every position, of which the first is kept.

Each way takes (images, tokens, tokens_aug): float32 [B, 3, S, S] in NCHW memory, one tensor for each view; int64
[B, L]; the same or None. It trains a copy of the model it was made from, and returns the loss and some gradients. So
the first call shows, at the weights of the model, what the calls timed afterwards do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Output
from bench.limits import float32_precision
from bench.peers import one_matrix, two_matrices
from fastbd.models import CLIP
from fastbd.models.clip import CONTEXT
from fastbd.models.memory_format import laid_out
from fastbd.models.resnet import AttentionPool, BasicBlock, Bottleneck, ModifiedResNet, SmallResNet
from fastbd.models.text import Block, Transformer
from fastbd.models.vit import VisionTransformer
from fastbd.training.optim import clamp_log_scale

M = TypeVar("M", bound=nn.Module)
Step = Callable[[Sequence[Tensor], Tensor, Tensor | None], Output]
WATCHED = {
    "visual.conv1.weight",
    "token_embedding.weight",
    "text_projection",
    "logit_scale",
    # Of the three image towers:
    "visual.attnpool.c_proj.weight",
    "visual.proj",
    "visual.projection.weight",
}
NAMES_EXEMPT = ("bn", "ln", "bias", "logit_scale")  # from weight decay; a shortcut's batch norm has no such name


@dataclass(frozen=True)
class Hyper:
    """What AdamW is given; the values are CleanCLIP's for pretraining."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def published(model: CLIP, hyper: Hyper) -> Step:
    """CleanCLIP's step of a copy of the model, at one learning rate."""
    return cleanclip(nchw_copy(model), hyper, repeat(hyper.lr))


def cleanclip(clip: CLIP, hyper: Hyper, rates: Iterable[float]) -> Step:
    """CleanCLIP: towers in float32 with TF32 convolutions; on a GPU the loss in fp16 with a gradient scaler.

    The step trains the model that is given, which is in training mode, each time at the next of the learning rates.
    """
    schedule = iter(rates)
    optimizer = adamw(clip, hyper, lambda name, _: any(part in name for part in NAMES_EXEMPT))
    cuda = clip.logit_scale.is_cuda
    scaler = torch.amp.GradScaler("cuda", enabled=cuda)

    def step(images: Sequence[Tensor], tokens: Tensor, tokens_aug: Tensor | None = None) -> Output:
        with switches("highest"):
            set_rate(optimizer, next(schedule))
            optimizer.zero_grad()
            towers = embed(clip, images, tokens, tokens_aug)
            with torch.autocast("cuda", torch.float16, enabled=cuda):  # not around the towers: its slip, kept
                loss = one_matrix(towers, clip.logit_scale)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
            scaler.update()
            clamp_log_scale(clip.logit_scale)
        return outputs(clip, loss)

    return step


def cleanclip_rates(peak: float, *, warmup: int, epochs: int, batches: int) -> Iterator[float]:
    """Learning rates of all steps: those of a counter that an epoch has advanced before the first step."""
    for epoch in range(1, epochs + 1):
        for step in range(batches * epoch, batches * (epoch + 1)):
            if step < warmup:
                yield peak * (step + 1) / warmup
            else:
                yield peak * (1 + math.cos(math.pi * (step - warmup) / (batches * epochs - warmup))) / 2


def par(clip: CLIP, poisoned: CLIP, hyper: Hyper, rates: Iterable[float], tau: float = 2.15) -> Step:
    """PAR in float32: both models are in eval mode, where the program leaves them, and see the same images."""
    schedule, factor = iter(rates), clip.logit_scale.detach().exp()
    clip.logit_scale.requires_grad_(False)  # the program takes a number from it
    optimizer = adamw(clip, hyper, lambda name, p: p.ndim < 2 or any(part in name for part in ("bias", "ln", "bn")))

    def step(images: Sequence[Tensor], tokens: Tensor, tokens_aug: Tensor | None = None) -> Output:
        set_rate(optimizer, next(schedule))
        optimizer.zero_grad()
        found = [F.normalize(x, dim=-1) for x in embed(clip, images, tokens, None)]
        with torch.no_grad():
            start = [F.normalize(x, dim=-1) for x in embed(poisoned, images, tokens, None)]
        logits, target = factor * found[0] @ found[1].T, torch.arange(len(tokens), device=tokens.device)
        clip_loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        apart = [(x - y).square().sum(1).mean() for x, y in zip(found, start, strict=True)]
        loss = clip_loss - sum(each for each in apart if each <= tau) / 2
        loss.backward()
        optimizer.step()
        return outputs(clip, loss)

    return step


def par_rates(peak: float, *, start: float, end: float, epochs: int, batches: int) -> list[float]:
    """Learning rates of PAR's steps: of a table for a step more in each epoch, which is read from its start."""
    first = epochs * (batches + 1) // 2
    rest = epochs * (batches + 1) - first
    falling = [start + (peak - start) * step / (first - 1) for step in range(first)]
    cosine = [end + (peak - end) * (1 + math.cos(math.pi * step / rest)) / 2 for step in range(rest)]
    return (falling + cosine)[: epochs * batches]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Have the next update made at this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def open_clip(model: CLIP, hyper: Hyper, backend: str | None = None) -> Step:
    """open_clip --precision amp_bf16; with a `backend` ("inductor") also --torchcompile-strategy step.

    That strategy compiles forward, loss, backward and update; its text is to be `trimmed`. Building it makes
    everything that was compiled before be compiled anew on its next call.
    """
    clip = nchw_copy(model)
    device = clip.logit_scale.device
    capturable = backend is not None and device.type == "cuda"
    optimizer = adamw(
        clip, hyper, lambda name, p: p.ndim < 2 or any(part in name for part in NAMES_EXEMPT), capturable=capturable
    )
    if capturable:
        for group in optimizer.param_groups:  # a number would be compiled in
            group["lr"] = torch.tensor(hyper.lr, device=device)

    def train(images: Sequence[Tensor], tokens: Tensor, tokens_aug: Tensor | None) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = two_matrices(embed(clip, images, tokens, tokens_aug), clip.logit_scale)
        loss.backward()
        optimizer.step()
        return loss

    if backend is not None:
        torch._dynamo.reset()  # all models share the code of `train`, and only a few variants of a code are kept
        train = torch.compile(train, backend=backend)

    def step(images: Sequence[Tensor], tokens: Tensor, tokens_aug: Tensor | None = None) -> Output:
        with switches("high"):
            optimizer.zero_grad()
            loss = train(images, tokens, tokens_aug)
            clamp_log_scale(clip.logit_scale)
        return outputs(clip, loss)

    return step


def trimmed(tokens: Tensor, tokens_aug: Tensor | None = None, *, multiple: int = 8) -> tuple[Tensor, Tensor | None]:
    """Both cut to the longest caption, rounded up to a multiple (--text-pad-multiple). It is the loader's work."""
    longest = 1 + max(int(text.argmax(1).max()) for text in (tokens, tokens_aug) if text is not None)
    length = min(CONTEXT, -(-longest // multiple) * multiple)
    return tokens[:, :length].contiguous(), None if tokens_aug is None else tokens_aug[:, :length].contiguous()


def outputs(model: nn.Module, loss: Tensor) -> Output:
    """The loss, and by name the gradients of WATCHED: of the first and last weights of both towers."""
    watched = {name: p for name, p in model.named_parameters() if name in WATCHED and p.requires_grad}
    return {"loss": loss.detach(), **{name: gradient(p) for name, p in watched.items()}}


def gradient(parameter: Tensor) -> Tensor:
    """The gradient that a backward pass has left."""
    assert parameter.grad is not None, "no backward pass has reached this parameter"
    return parameter.grad


def nchw_copy(model: CLIP) -> CLIP:
    """In training mode. Weights laid out for channels_last would draw the convolutions there."""
    return laid_out(deepcopy(model), torch.contiguous_format).train()


def adamw(model: nn.Module, hyper: Hyper, exempt: Callable[[str, Tensor], bool], **about) -> torch.optim.AdamW:
    """As both programs call it: not fused; `exempt` (name, parameter) tells what is not decayed."""
    free = [p for name, p in model.named_parameters() if exempt(name, p)]
    decayed = [p for name, p in model.named_parameters() if not exempt(name, p)]
    groups = [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": hyper.weight_decay}]
    return torch.optim.AdamW(groups, lr=hyper.lr, betas=hyper.betas, eps=hyper.eps, **about)


@contextmanager
def switches(matmul: str):
    """Both programs time cuDNN's algorithms and allow TF32 in convolutions; `matmul` as in float32_precision."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = cudnn.benchmark = True
    try:
        with float32_precision(matmul):
            yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


def embed(clip: CLIP, images: Sequence[Tensor], tokens: Tensor, tokens_aug: Tensor | None) -> list[Tensor]:
    """Raw embeddings [B, D]: image, text, and of the second views image_aug, text_aug. One forward for both views."""
    texts = tokens if tokens_aug is None else torch.cat([tokens, tokens_aug])
    image, text = image_tower(clip.visual, torch.cat(list(images))), text_tower(clip, texts)
    pairs = zip(image.split(len(tokens)), text.split(len(tokens)), strict=True)
    return [tower for pair in pairs for tower in pair]


def image_tower(visual: nn.Module, pixels: Tensor) -> Tensor:
    """[B, 3, S, S] -> [B, embed_dim]."""
    match visual:
        case VisionTransformer():
            return vision_transformer(visual, pixels)
        case SmallResNet():
            return small_resnet(visual, pixels)
        case ModifiedResNet():
            return modified_resnet(visual, pixels)
    raise TypeError(f"a {type(visual).__name__} is none of the image towers")


def modified_resnet(visual: ModifiedResNet, x: Tensor) -> Tensor:
    for i in (1, 2, 3):
        x = activated(x, getattr(visual, f"conv{i}"), getattr(visual, f"bn{i}"))
    x = F.avg_pool2d(x, 2)
    for block in of_kind(Bottleneck, visual):
        y = activated(activated(x, block.conv1, block.bn1), block.conv2, block.bn2)
        y = block.bn3(block.conv3(y if block.avgpool is None else block.avgpool(y)))
        y += x if block.downsample is None else block.downsample(x)
        x = F.relu(y, inplace=True)
    return attention_pool(visual.attnpool, x)


def small_resnet(visual: SmallResNet, x: Tensor) -> Tensor:
    """No published program has it: the same manner for the same network."""
    x = activated(x, visual.conv1, visual.bn1)
    for block in of_kind(BasicBlock, visual.stages):
        y = block.bn2(block.conv2(activated(x, block.conv1, block.bn1)))
        y += x if block.downsample is None else block.downsample(x)
        x = F.relu(y, inplace=True)
    return visual.projection(x.mean((2, 3)))


def of_kind(kind: type[M], model: nn.Module) -> Iterator[M]:
    """Yield the model's blocks of a kind, in their order."""
    return (module for module in model.modules() if isinstance(module, kind))


def activated(x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    return F.relu(norm(convolution(x)), inplace=True)


def attention_pool(pool: AttentionPool, x: Tensor) -> Tensor:
    """[B, width, side, side] -> [B, embed_dim]."""
    x = x.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x])
    x = x + pool.positional_embedding[:, None].to(x.dtype)
    projections = pool.q_proj, pool.k_proj, pool.v_proj
    weights = {f"{name}_proj_weight": p.weight for name, p in zip("qkv", projections, strict=True)}
    biases = torch.cat([p.bias for p in projections])
    answers = attended(x, pool.heads, (None, biases), pool.c_proj, use_separate_proj_weight=True, **weights)
    return answers[0]


def attended(x: Tensor, heads: int, inputs: tuple[Tensor | None, Tensor], out: nn.Linear, **how: Any) -> Tensor:
    """PyTorch's multi-head attention of [L, B, width]; `inputs` are weight and bias of its input's projection."""
    answers, _ = F.multi_head_attention_forward(
        x, x, x, x.shape[-1], heads, *inputs, None, None, False, 0.0, out.weight, out.bias, need_weights=False, **how
    )
    return answers


def vision_transformer(visual: VisionTransformer, pixels: Tensor) -> Tensor:
    patches = visual.conv1(pixels).flatten(2).permute(0, 2, 1)
    first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    x = torch.cat([first, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
    x = transformer(visual.transformer, normed(visual.ln_pre, x), None)
    return normed(visual.ln_post, x[:, 0]) @ visual.proj


def text_tower(clip: CLIP, tokens: Tensor) -> Tensor:
    """[B, L] -> [B, embed_dim]."""
    length = tokens.shape[1]
    x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    mask = x.new_full((length, length), float("-inf")).triu(1)
    x = normed(clip.ln_final, transformer(clip.transformer, x, mask))
    return x[torch.arange(len(x), device=x.device), tokens.argmax(-1)] @ clip.text_projection


def transformer(blocks: Transformer, x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, L, width] -> [B, L, width]; `mask` is added to the logits."""
    x = x.permute(1, 0, 2).contiguous()
    for block in of_kind(Block, blocks):
        attn, mlp, y = block.attn, block.mlp, normed(block.ln_1, x)
        y = attended(y, attn.heads, (attn.in_proj_weight, attn.in_proj_bias), attn.out_proj, attn_mask=mask)
        x = x + y
        y = mlp.c_fc(normed(block.ln_2, x))
        x = x + mlp.c_proj(y * torch.sigmoid(1.702 * y))
    return x.permute(1, 0, 2)


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm that keeps the type: autocast would widen the residual stream of the vision transformer."""
    return norm(x).to(x.dtype)
