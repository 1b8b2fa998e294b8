#!/bin/sh
# In transformers 5.24.0 `pooler_output` of a CLIP image tower is one thing when the tower is called and another within
# the output of the whole model: CLIPModel(...).vision_model_output.pooler_output has been projected already. Code that
# applies visual_projection to it projects twice, or fails where the widths differ, as here. In 4.57.6 both are the same,
# not projected. get_image_features gave a tensor there; in 5.24.0 it gives an output object.
#
# Output seen, on Python 3.11 (a tower 48 wide, projected to 24):
#   transformers 4.57.6: tower 48, within the model 48, get_image_features Tensor
#   transformers 5.24.0: tower 48, within the model 24, get_image_features BaseModelOutputWithPooling
#
# Needs a network, or a mirror of PyPI, and 2 GB of disk for a while. Exits 1 if either line is another.
#     PYTHON=python3.11 sh findings/transformers_clip_pooler_output.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/pool.py" <<'POOL'
import torch
import transformers
from transformers import CLIPConfig, CLIPModel

transformers.logging.set_verbosity_error()
layers = dict(intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
text = dict(hidden_size=32, vocab_size=100, bos_token_id=98, eos_token_id=99, pad_token_id=0, **layers)
vision = dict(hidden_size=48, image_size=32, patch_size=16, **layers)
model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
pixels, ids = torch.zeros(1, 3, 32, 32), torch.tensor([[98, 5, 99]])
with torch.no_grad():
    tower = model.vision_model(pixels).pooler_output.shape[-1]
    within = model(input_ids=ids, pixel_values=pixels).vision_model_output.pooler_output.shape[-1]
    features = type(model.get_image_features(pixel_values=pixels)).__name__
print(
    f"transformers {transformers.__version__}: tower {tower}, within the model {within}, get_image_features {features}"
)
POOL
"${PYTHON:-python3}" -m venv "$folder/venv"
pip="$folder/venv/bin/pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0 numpy==2.4.6
for version in 4.57.6 5.24.0; do
    $pip "transformers==$version"
    "$folder/venv/bin/python" -W ignore "$folder/pool.py"
done | tee "$folder/seen"
cat >"$folder/expected" <<'EXPECTED'
transformers 4.57.6: tower 48, within the model 48, get_image_features Tensor
transformers 5.24.0: tower 48, within the model 24, get_image_features BaseModelOutputWithPooling
EXPECTED
cmp -s "$folder/seen" "$folder/expected" || { echo "this has changed" >&2; exit 1; }
