#!/bin/sh
# open_clip 3.3.0 chooses the tokenizer by the model's name: get_tokenizer("NAME") gives SigLIP's for every name with
# "siglip" in it, although the model config says vocab_size 49408, as that of a CLIP that was merely fine-tuned with
# SigLIP's loss. Its ids are of another vocabulary, of 32,000: encode_text() takes them without a word.
# The tokenizer itself is replaced here, as it would download its vocabulary.
#
# Output seen, on Python 3.11:
#   mine: SimpleTokenizer, mine-siglip: SigLIP's
#
# Needs a network, or a mirror of PyPI, and 6 GB of disk for a while. Exits 1 if the line is another.
#     PYTHON=python3.11 sh findings/open_clip_siglip_in_a_name.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/named.py" <<'NAMED'
import json
from pathlib import Path

import open_clip

text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
open_clip.factory.SigLipTokenizer = lambda *arguments, **named: "SigLIP's"
said = []
for name in ("mine", "mine-siglip"):
    Path(f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(f"{name}.json")
    tokenizer = open_clip.get_tokenizer(name)
    said.append(f"{name}: {tokenizer if isinstance(tokenizer, str) else type(tokenizer).__name__}")
print(", ".join(said))
NAMED
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check open_clip_torch==3.3.0 torch==2.14.1 \
    torchvision==0.29.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore named.py | tee seen
echo "mine: SimpleTokenizer, mine-siglip: SigLIP's" >expected
cmp -s seen expected || { echo "this has changed" >&2; exit 1; }
