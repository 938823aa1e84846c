"""Draw where each head of a model attends."""
import numpy as np
import torch

from engine.common import optional
from model import ATTENTION_BACKEND, manual_attention

# inches around the maps
LEFT, RIGHT, TOP, BOTTOM = 0.8, 1.3, 0.5, 0.8
LARGEST = 10000  # pixels of width or height


@torch.no_grad()
def attention_weights(model, idx):
    """
    Return where each head attends in idx (B, T): per layer, (B, H, T, T) float32 with rows
    (queries) summing to 1. The weights are computed by definition from the q, k and mask given to
    the backend.
    """
    weights = []
    backend = ATTENTION_BACKEND[model.config.attention_backend]

    def record(q, k, v, dropout, config, mask=None):
        # with the identity as v, the output is the weights
        identity = torch.eye(k.size(2), device=k.device).expand(*k.shape[:2], -1, -1)
        weights.append(manual_attention(q.float(), k.float(), identity, 0.0, config, mask))
        return backend(q, k, v, dropout, config, mask)
    try:
        for block in model.transformer.h:
            block.attn.attend = record
        model.forward(idx)
    finally:
        for block in model.transformer.h:
            block.attn.attend = backend
    return weights


def draw_attention(weights, tokens, path):
    """
    Draw attention weights (layers, heads, T, T) as heat maps, one row per layer and one column per
    head, into the file `path`. `tokens` are T strings that label the axes if there is room.
    """
    Figure = optional('matplotlib.figure', '--attention').Figure
    PowerNorm = optional('matplotlib.colors', '--attention').PowerNorm
    layers, heads, T, _ = weights.shape
    step = T + 1  # distance between maps: a white line separates them
    legible = T <= 40 and T * max(layers, heads) <= 600
    size = max(1.2, 0.13 * step if legible else T / 60)  # inches per map
    width, height = size * heads + LEFT + RIGHT, size * layers + TOP + BOTTOM

    figure = Figure(figsize=(width, height), dpi=min(120, LARGEST / max(width, height)))
    share_x, share_y = 1 - (LEFT + RIGHT) / width, 1 - (TOP + BOTTOM) / height
    ax = figure.add_axes((LEFT / width, BOTTOM / height, share_x, share_y))
    norm = PowerNorm(1 / 3, 0, 1)  # a root, because most weights are small
    image = ax.imshow(side_by_side(weights), norm=norm, aspect='auto')
    if legible:
        label_axes(ax, tokens, layers, heads)
    else:
        ax.set_xticks([])
        ax.set_yticks([])
    ax.set(xlabel='attended token (key)', ylabel='attending token (query)')
    for head in range(heads):
        middle = head * step + T / 2
        ax.text(middle, -1, f'head {head}', ha='center', va='bottom', fontsize=8)
    for layer in range(layers):
        middle = layer * step + T / 2
        ax.text(heads * step, middle, f'layer {layer}', va='center', fontsize=8, rotation=90)
    bar = (1 - LEFT / width, BOTTOM / height, 0.15 / width, min(4, size * layers) / height)
    figure.colorbar(image, cax=figure.add_axes(bar), label='attention weight')
    figure.savefig(path)


def side_by_side(weights):
    """Return all maps in one image, (layers * (T + 1), heads * (T + 1)). NaN is drawn white."""
    layers, heads, T, _ = weights.shape
    seen = np.tri(T, dtype=bool)  # attention is causal
    image = np.full((layers, T + 1, heads, T + 1), np.nan, np.float32)
    image[:, :T, :, :T] = np.where(seen, weights, np.nan).swapaxes(1, 2)
    return image.reshape(layers * (T + 1), heads * (T + 1))


def label_axes(ax, tokens, layers, heads):
    labels = [repr(token)[1:-1].replace(' ', '\u2423') for token in tokens]  # visible spaces
    T = len(labels)

    def positions(maps):
        return [i * (T + 1) + t for i in range(maps) for t in range(T)]
    ax.set_xticks(positions(heads), labels * heads, rotation=90, fontsize=6, parse_math=False)
    ax.set_yticks(positions(layers), labels * layers, fontsize=6, parse_math=False)
