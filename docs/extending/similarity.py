"""An evaluator: how alike the images of the evaluation set are to the model, clean and triggered."""

from torch.nn.functional import normalize


def alike(towers, data):
    """Return numbers that are added to the row of metrics.jsonl."""
    found = {"clean_cosine": _cosine(towers.images(data.clean))}
    if data.attacked:
        found["triggered_cosine"] = _cosine(towers.images(data.attacked[0].images))
    return found


def _cosine(embeddings):
    """Return the mean cosine of two of the embeddings [N, D]."""
    x, count = normalize(embeddings, dim=1), len(embeddings)
    return float((x.sum(0).square().sum() - count) / (count * (count - 1)))
