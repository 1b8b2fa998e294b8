#!/bin/sh
# OpenAI's clip.load() takes a state dict of float32, and on a CPU returns a model of float32. On the way the weights go
# through a model in which those of convolutions, linear layers, attention and projections are of half precision: they
# come out rounded to 11 bits, and beyond 65504 infinite. load_state_dict() on the model that was returned brings them
# as they are. clip-anytorch 2.6.0 holds OpenAI's files.
#
# Output seen, on Python 3.11:
#   torch.float32 model, weights as saved: False, rounded to half: True, loaded again: True
#
# Needs a network, or a mirror of PyPI, and 6 GB of disk for a while. Exits 1 if the line is another.
#     PYTHON=python3.11 sh findings/openai_clip_rounds_weights.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/rounds.py" <<'ROUNDS'
import clip
import torch
from clip.model import CLIP

torch.manual_seed(0)
path = "weights.pt"
made = CLIP(64, 32, 1, 64, 8, 77, 49408, 64, 1, 1)
torch.save(made.state_dict(), path)
saved = made.visual.conv1.weight
model, _ = clip.load(path, device="cpu")
loaded = model.visual.conv1.weight.clone()
model.load_state_dict(torch.load(path))
as_saved, rounded = torch.equal(loaded, saved), torch.equal(loaded, saved.half().float())
again = torch.equal(model.visual.conv1.weight, saved)
print(f"{loaded.dtype} model, weights as saved: {as_saved}, rounded to half: {rounded}, loaded again: {again}")
ROUNDS
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check clip-anytorch==2.6.0 "setuptools<81" torch==2.14.1 \
    torchvision==0.29.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore rounds.py | tee seen
echo "torch.float32 model, weights as saved: False, rounded to half: True, loaded again: True" >expected
cmp -s seen expected || { echo "this has changed" >&2; exit 1; }
