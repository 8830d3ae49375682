"""The papers' equations, slow and literal: the answers that the package is held against.

Every function handles one image and loops where the equation has an index.
"""

import numpy as np
import torch
import torch.nn.functional as F


def attention_and_gradients(model, image, target):
    """Attention maps of a timm model and their gradients, from its unfused attention.

    Uses the dropout module that every attention map passes, so nothing of the package.
    """
    maps, handles, fused = [], [], []

    def keep(_module, _inputs, output):
        output.retain_grad()
        maps.append(output)

    attentions = [block.attn for block in model.blocks]
    try:
        for attention in attentions:
            fused.append(attention.fused_attn)
            attention.fused_attn = False
            handles.append(attention.attn_drop.register_forward_hook(keep))
        with torch.enable_grad():
            model(image[None].detach().requires_grad_())[0, target].backward()
    finally:
        for attention, setting in zip(attentions, fused, strict=False):
            attention.fused_attn = setting
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return [(a[0].detach(), a.grad[0]) for a in maps]


def relevance_matrix(maps, start_layer=0):
    """Chefer et al. 2021: R = (I + E_L) ... (I + E_1), E the positive part's head mean."""
    identity = torch.eye(maps[0][0].shape[-1]).to(maps[0][0])
    relevance = identity
    for layer in layer_relevances(maps)[start_layer:]:
        relevance = (identity + layer) @ relevance
    return relevance


def layer_relevances(maps):
    """E of each layer, one head at a time."""
    layers = []
    for attention, gradient in maps:
        layer = torch.zeros_like(attention[0])
        for head in range(attention.shape[0]):
            layer += torch.clamp(attention[head] * gradient[head], min=0) / attention.shape[0]
        layers.append(layer)
    return layers


def rollout(maps, start_layer=0):
    """Abnar & Zuidema 2020: head means plus identity, rows normalised, multiplied up."""
    identity = torch.eye(maps[0][0].shape[-1]).to(maps[0][0])
    rolled = identity
    for attention, _ in maps[start_layer:]:
        layer = identity.clone()
        for head in attention:
            layer += head / len(attention)
        for row in range(len(layer)):
            layer[row] /= layer[row].sum()
        rolled = layer @ rolled
    return rolled


def pooling_weights(maps, num_tokens):
    """w_j of attention that reads the answer out of the tokens, entry by entry.

    Each map is (h, Q, M), over the last M tokens, or over its own Q queries and then all N.
    """
    layers = layer_relevances(maps)
    weights = torch.zeros(num_tokens).to(layers[-1])
    share = torch.ones(len(layers[-1])).to(layers[-1])
    for layer in reversed(layers):
        queries, keys = layer.shape
        passed = share.clone()
        for q in range(queries):
            for m in range(keys):
                if keys <= num_tokens:
                    weights[num_tokens - keys + m] += layer[q, m]
                elif m < queries:
                    passed[m] += share[q] * layer[q, m]
                else:
                    weights[m - queries] += share[q] * layer[q, m]
        share = passed
    return weights / weights.sum() if weights.any() else weights


def grad_cam(maps, readout, prefix=1):
    """Grad-CAM of the last attention: heads as channels, the readout's row as the picture."""
    attention, gradient = maps[-1]
    total = torch.zeros_like(attention[0, 0, prefix:])
    for head in range(len(attention)):
        weight = (readout @ gradient[head])[prefix:].mean()
        total += weight * (readout @ attention[head])[prefix:] / len(attention)
    return total.clamp(min=0)


def component_masks(layers, count):
    """Principal components of the tokens' features in all layers, by the matrix they stand in."""
    tokens = [[float(x) for features in layers for x in features[i]] for i in range(len(layers[0]))]
    numbers = np.array(tokens) - np.mean(tokens, axis=0)
    components = np.linalg.svd(numbers, full_matrices=False)[0].T[:count]
    found = []
    for component in components:
        component = component * np.sign(component[np.abs(component).argmax()])
        found.append((component - component.min()) / (component.max() - component.min()))
    return torch.tensor(np.array(found), dtype=torch.float32)


def min_max(values):
    """From 0 to 1; 0 throughout where all are alike."""
    if values.max() == values.min():
        return torch.zeros_like(values)
    return (values - values.min()) / (values.max() - values.min())


def masks(relevance, scale_by_maxima=True):
    """Equations 1-2 and Figure 4, for the (J, J) relevance among image tokens."""
    tokens = relevance.shape[0]
    filled = relevance.clone()
    for j in range(tokens):
        filled[j, j] = torch.cat([relevance[:j, j], relevance[j + 1 :, j]]).max()
    red = torch.zeros_like(filled)
    for j in range(tokens):
        red[:, j] = min_max(filled[:, j])
    if not scale_by_maxima:
        return red
    return red * min_max(torch.stack([filled[:, j].max() for j in range(tokens)]))


def reflected_image(image, column, grid_size, baseline=0.0):
    """Equations 3-4: one column of the masks, as the image seen through it, patch by patch."""
    rows, columns = grid_size
    height, width = image.shape[-2] // rows, image.shape[-1] // columns
    seen = torch.zeros_like(image)
    for row in range(rows):
        for col in range(columns):
            patch = (
                slice(None),
                slice(row * height, (row + 1) * height),
                slice(col * width, (col + 1) * width),
            )
            weight = column[row * columns + col]
            seen[patch] = image[patch] * weight + baseline * (1 - weight)
    return seen


def reflected_scores(forward, image, target, columns, grid_size, baseline=0.0, score="logit"):
    """l_j: what the model says of each reflected image, one forward each."""
    scores = []
    with torch.no_grad():
        for j in range(columns.shape[1]):
            seen = reflected_image(image, columns[:, j], grid_size, baseline)
            logits = forward(seen[None])[0]
            if score == "probability":
                logits = logits.softmax(dim=0)
            scores.append(logits[target])
    return torch.stack(scores)


def mask_weighted(columns, scores, score):
    """Every reflected image adds its probability, or its logit above the median, to its tokens."""
    if score == "logit":
        middle = scores.sort().values[(len(scores) - 1) // 2]
        scores = torch.stack([max(value - middle, torch.zeros(())) for value in scores])
    total = torch.zeros(columns.shape[0])
    for j in range(columns.shape[1]):
        for token in range(columns.shape[0]):
            total[token] += scores[j] * columns[token, j]
    return total


def reflected_relevance(model, image, target, grid_size, prefix=1, baseline=0.0, **options):
    """Section 3, from the image to the (H, W) map: min-max of both terms, then their sum."""
    relevance = relevance_matrix(attention_and_gradients(model, image, target))
    among_image_tokens = relevance[prefix:, prefix:]
    if options.get("reflect") == "rows":
        among_image_tokens = among_image_tokens.T
    columns = masks(among_image_tokens, options.get("scale_by_maxima", True))
    score = options.get("score", "logit")
    scores = reflected_scores(model, image, target, columns, grid_size, baseline, score)
    if options.get("aggregate", "token") == "mask_weighted":
        scores = mask_weighted(columns, scores, score)
    terms = [scores, relevance[0, prefix:]]
    if options.get("combine", "minmax") == "minmax":
        terms = [min_max(term) for term in terms]
    saliency = options.get("reflected_weight", 1.0) * terms[0] + terms[1]
    return enlarged(saliency, grid_size, image.shape[-2:])


def enlarged(saliency, grid_size, image_size):
    """Token saliency (J,) as an (H, W) map."""
    grid = saliency.reshape(1, 1, *grid_size)
    return F.interpolate(grid, tuple(image_size), mode="bilinear").reshape(tuple(image_size))
