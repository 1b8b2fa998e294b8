"""Trees of prompts by hand and against sets of beginnings; embeddings against packed and padded prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastbd.data.tokenizer import tokenize
from fastbd.kernels.text_pack import END, lengths_of, pack
from fastbd.kernels.text_tree import tree
from fastbd.models import create

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["tench", "great white shark", "dog", "tench"]
FORMS = ["a photo of a {}.", "a photo of many {}.", "{}.", "{} photo", "a photo of the cool " + 80 * "very " + "{}"]


def rows(*prompts: list[int], length: int = 8) -> np.ndarray:
    return np.array([[*tokens, *[0] * (length - len(tokens))] for tokens in prompts], np.uint16)


def prompts() -> np.ndarray:
    """Of 4 to 77 tokens; some begin with the class, and two classes have one name."""
    found = tokenize([form.replace("{}", name) for name in NAMES for form in FORMS])
    assert lengths_of(found).min() == 4 and lengths_of(found).max() == 77
    return found


def test_a_tree_done_by_hand():
    found = tree(rows([1, 5, 7, END], [1, 5, END], [1, 6, 7, END]))
    #        1
    #     5     6
    #   7  END    7
    #  END       END
    assert found.tokens.tolist() == [1, 5, 6, 7, END, 7, END, END]
    assert found.positions.tolist() == [0, 1, 1, 2, 2, 2, 3, 3]
    assert found.ends.tolist() == [6, 4, 7]
    assert found.nodes.tolist() == [0, 1, 3, 6, 0, 1, 4, 0, 2, 5, 7]
    assert found.starts.tolist() == [0, 4, 7, 11] and found.starts.dtype == torch.int32
    assert found.nodes[found.places].tolist() == list(range(8))
    assert {x.dtype for x in found if x is not found.starts} == {torch.int64}


def test_what_is_behind_an_end_token_is_no_part_of_a_prompt():
    found = tree(rows([1, 2, END, 9], [1, 2, END, 8], [1, 0, END]))  # 0 is "!", a token
    assert found.tokens.tolist() == [1, 0, 2, END, END] and found.ends.tolist() == [4, 4, 3]


def test_a_node_for_each_distinct_beginning():
    texts = [tuple(row[:n].tolist()) for row, n in zip(prompts(), lengths_of(prompts()), strict=True)]
    beginnings, found = {text[:n] for text in texts for n in range(1, len(text) + 1)}, tree(prompts())
    assert len(found.tokens) == len(beginnings) < len(found.nodes) == sum(map(len, texts))
    assert found.tokens[found.nodes].tolist() == [token for text in texts for token in text]


def padded(model, tokens: torch.Tensor) -> torch.Tensor:
    """The text tower on all 77 places, with a causal mask."""
    x = model.token_embedding(tokens) + model.positional_embedding
    for block in model.transformer.resblocks:
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.out_proj(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x)[torch.arange(len(x)), (tokens == END).int().argmax(1)] @ model.text_projection


@pytest.mark.parametrize("name", ["tiny-rn", "demo"])
@torch.no_grad()
def test_embeddings_are_those_of_packed_and_of_padded_prompts(name):
    """In float64, to 1e-9, with one layer and with two."""
    model, tokens = create(name, 0).double(), prompts()
    found = model.encode_text(tree(tokens))
    assert torch.equal(found[:5], found[15:])  # tench twice
    for other in (model.encode_text(pack(tokens)), padded(model, torch.from_numpy(tokens.astype(np.int64)))):
        torch.testing.assert_close(found, other, rtol=0, atol=1e-9)


@torch.no_grad()
def test_bf16():
    model = create("demo", 0).to(DEVICE)
    texts = [type(text)(*(x.to(DEVICE) for x in text)) for text in (tree(prompts()), pack(prompts()))]
    truth = model.encode_text(texts[1])
    with torch.autocast(DEVICE, torch.bfloat16):
        found = [model.encode_text(text).float() for text in texts]
    errors = [((x - truth).norm() / truth.norm()).item() for x in found]
    assert errors[0] < 1.1 * errors[1] < 2e-2


def test_compiles_to_one_graph():
    model, text = create("tiny-rn", 0), tree(prompts())
    compiled = torch.compile(model.encode_text, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(text), model.encode_text(text))
