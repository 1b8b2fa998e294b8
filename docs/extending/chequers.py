"""A trigger: a chequered square in the upper left corner."""

import torch


def corner(spec, seed, ids, images):
    """Return triggered copies of images uint8 [B, H, W, 3], which are already fitted to the model's input."""
    places = torch.arange(spec.patch_size, device=images.device) // 2
    board = 255 * ((places[:, None] + places) % 2)
    triggered = images.clone()
    triggered[:, : spec.patch_size, : spec.patch_size] = board[..., None].to(torch.uint8)
    return triggered
