#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""make_model.py {mamba2,gated_delta} FOLDER: writes a model with random bf16 weights of the paper's size: 21 layers,
hidden size 1536, 0.8 G parameters, in one file.  Needs nothing but Python; memory stays small."""
import json
import os
import random
import struct
import sys

LAYERS, HIDDEN, MLP, VOCABULARY, LEVELS = 21, 1536, 4096, 32000, 15


def mamba2():
    heads, dim_v, dim_k = 48, 64, 128
    inner = heads * dim_v
    channels = inner + 2 * dim_k
    config = dict(model_type="log_linear_mamba2", hidden_size=HIDDEN, num_hidden_layers=LAYERS, vocab_size=VOCABULARY,
                  num_heads=heads, head_dim=dim_v, state_size=dim_k, expand=2, n_groups=1, conv_kernel=4, norm_eps=1e-5,
                  tie_word_embeddings=False, hidden_act="silu")
    layer = [("mixer_norm.weight", [HIDDEN]),
             ("mixer.in_proj.weight", [inner + channels + heads + heads * LEVELS, HIDDEN]),
             ("mixer.conv1d.weight", [channels, 1, 4]), ("mixer.conv1d.bias", [channels]), ("mixer.dt_bias", [heads]),
             ("mixer.A_log", [heads]), ("mixer.D", [heads]), ("mixer.L", [heads, LEVELS]),
             ("mixer.norm.weight", [inner]), ("mixer.out_proj.weight", [HIDDEN, inner])]
    return config, "backbone.", "norm_f.weight", layer


def gated_delta():
    heads, dim_k, dim_v = 6, 192, 384
    config = dict(model_type="h_gated_deltanet", hidden_size=HIDDEN, num_hidden_layers=LAYERS, vocab_size=VOCABULARY,
                  num_heads=heads, head_dim=dim_k, expand_v=2, conv_size=4, norm_eps=1e-6, tie_word_embeddings=False,
                  hidden_act="swish")
    layer = [("attn_norm.weight", [HIDDEN]), ("attn.A_log", [heads]), ("attn.L", [heads, LEVELS]),
             ("attn.dt_bias", [heads]), ("attn.a_proj.weight", [heads, HIDDEN]),
             ("attn.b_proj.weight", [heads, HIDDEN]), ("attn.l_proj.weight", [heads * LEVELS, HIDDEN]),
             ("attn.g_proj.weight", [heads * dim_v, HIDDEN]), ("attn.o_norm.weight", [dim_v]),
             ("attn.o_proj.weight", [HIDDEN, heads * dim_v])]
    for stream, width in (("q", heads * dim_k), ("k", heads * dim_k), ("v", heads * dim_v)):
        layer += [(f"attn.{stream}_proj.weight", [width, HIDDEN]), (f"attn.{stream}_conv1d.weight", [width, 1, 4])]
    return config, "model.", "norm.weight", layer


def bfloat16(values):
    return b"".join(struct.pack("<f", v)[2:] for v in values)


def data(name, shape, noise):
    """Matrices: rows of noise scaled by the square root of their width, from a table; norms 1; the rest small."""
    count = 1
    for extent in shape:
        count *= extent
    if name.endswith("norm.weight") or name.endswith("norm_f.weight"):
        return bfloat16([1.0]) * count
    if len(shape) != 2 or name.endswith(".L"):
        return bfloat16(random.gauss(0, 0.5) for _ in range(count))
    table = noise.setdefault(shape[1], bfloat16(random.gauss(0, shape[1] ** -0.5) for _ in range(1 << 16)))
    parts, left = [], 2 * count
    while left > 0:
        start = 2 * random.randrange(1 << 15)
        parts.append(table[start:start + left])
        left -= len(parts[-1])
    return b"".join(parts)


def main():
    kind, folder = sys.argv[1:]
    random.seed(1)
    config, prefix, final_norm, layer = {"mamba2": mamba2, "gated_delta": gated_delta}[kind]()
    mlp = [("mlp_norm.weight", [HIDDEN]), ("mlp.gate_proj.weight", [MLP, HIDDEN]), ("mlp.up_proj.weight", [MLP, HIDDEN]),
           ("mlp.down_proj.weight", [HIDDEN, MLP])]
    tensors = [(prefix + "embeddings.weight", [VOCABULARY, HIDDEN]), (prefix + final_norm, [HIDDEN]),
               ("lm_head.weight", [VOCABULARY, HIDDEN])]
    tensors += [(f"{prefix}layers.{i}.{name}", shape) for i in range(LAYERS) for name, shape in layer + mlp]
    header, offset = {}, 0
    for name, shape in tensors:
        size = 2
        for extent in shape:
            size *= extent
        header[name] = dict(dtype="BF16", shape=shape, data_offsets=[offset, offset + size])
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w", encoding="ascii") as file:
        json.dump(config, file, indent=2)
    noise = {}
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors:
            file.write(data(name, shape, noise))
    print(f"{folder}: {offset // 2 / 1e9:.3f} G parameters")


if __name__ == "__main__":
    main()
