"""Aquila once more, in numpy and fp64, written from the formulas and sharing no code with the package.

Shapes: one row of S tokens, dim, H query heads, K key heads, D = dim / H. Loops over heads, on purpose.
"""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x, theta):
    """Each pair (2i, 2i + 1) of x (S, D) turned by position * theta^(-2i / D), as complex numbers."""
    seq, dim = x.shape
    frequencies = theta ** (-np.arange(0, dim, 2) / dim)
    turns = np.exp(1j * np.outer(np.arange(seq), frequencies))
    z = (x[:, 0::2] + 1j * x[:, 1::2]) * turns
    out = np.empty_like(x)
    out[:, 0::2], out[:, 1::2] = z.real, z.imag
    return out


def attention(x, weights, prefix, heads, kv_heads, theta):
    q, k, v = (x @ weights[f"{prefix}.attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
    size = q.shape[1] // heads
    future = np.triu(np.ones((len(x), len(x)), dtype=bool), 1)
    out = np.empty_like(q)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        shared = head // (heads // kv_heads)
        shared = slice(shared * size, (shared + 1) * size)
        scores = rotate(q[:, own], theta) @ rotate(k[:, shared], theta).T / np.sqrt(size)
        scores[future] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, own] = scores / scores.sum(-1, keepdims=True) @ v[:, shared]
    return out @ weights[f"{prefix}.attention.wo.weight"].T


def feed_forward(x, weights, prefix):
    gate, up = (x @ weights[f"{prefix}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
    return (gate / (1 + np.exp(-gate)) * up) @ weights[f"{prefix}.feed_forward.w2.weight"].T


def logits(tokens, weights, *, n_layers, heads, kv_heads, theta, eps):
    """Logits (S, V) of one row of token ids; `weights` by released names, fp64 arrays."""
    x = weights["tok_embeddings.weight"][tokens]
    for layer in range(n_layers):
        prefix = f"layers.{layer}"
        normed = rms_norm(x, weights[f"{prefix}.attention_norm.weight"], eps)
        x = x + attention(normed, weights, prefix, heads, kv_heads, theta)
        normed = rms_norm(x, weights[f"{prefix}.ffn_norm.weight"], eps)
        x = x + feed_forward(normed, weights, prefix)
    return rms_norm(x, weights["norm.weight"], eps) @ weights["output.weight"].T


def loss(logits_, labels):
    """Mean of -log softmax at the labels."""
    top = logits_.max(-1, keepdims=True)
    lse = np.log(np.exp(logits_ - top).sum(-1)) + top[:, 0]
    return (lse - logits_[np.arange(len(labels)), labels]).mean()
