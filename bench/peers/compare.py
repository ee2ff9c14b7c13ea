#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times what a user would pick instead of loglin, where it is installed, beside `loglin bench --suite paper`.

    bench/peers/compare.py [--loglin build/release/loglin] [--lengths 2048,8192] [--repetitions 21]

Batch 2, 48 heads, K 128, V 64, bfloat16, random inputs in turn, medians by CUDA events.  Fetches nothing; what is missing
is skipped with a line that says so.
"""
import argparse
import json
import statistics
import subprocess

BATCH, HEADS, DIM_K, DIM_V, SETS, WARM_UP = 2, 48, 128, 64, 3, 3


def median_ms(torch, call, sets, repetitions):
    times = []
    for i in range(WARM_UP + repetitions):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(sets[i % len(sets)])
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[WARM_UP:])


def time_peer(torch, name, make, attend, repetitions):
    """(name, forward ms, forward + backward ms); None where it does not run."""
    try:
        sets = [make() for _ in range(SETS)]

        def forward(inputs):
            with torch.no_grad():
                attend(*inputs)

        def both(inputs):
            o = attend(*inputs)
            o = o[0] if isinstance(o, tuple) else o
            torch.autograd.grad(o, [x for x in inputs if x.requires_grad], torch.ones_like(o))

        return name, median_ms(torch, forward, sets, repetitions), median_ms(torch, both, sets, repetitions)
    except Exception as error:  # a peer that does not take the shape must not end the table
        print(f"skipped: {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return None


def random(torch, *shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def time_attention(torch, length, repetitions):
    from torch.nn.functional import scaled_dot_product_attention

    def make():
        shape = (BATCH, HEADS, length)
        return random(torch, *shape, DIM_K), random(torch, *shape, DIM_K), random(torch, *shape, DIM_V)

    return time_peer(
        torch,
        "PyTorch attention",
        make,
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
        repetitions,
    )


def time_fla(torch, length, repetitions):
    """The chunk kernels of flash-linear-attention: linear attention with scalar gates (Mamba-2), and log-linear."""
    rows = []

    def make(levels):
        shape = (BATCH, length, HEADS)
        tensors = [random(torch, *shape, DIM_K), random(torch, *shape, DIM_K), random(torch, *shape, DIM_V)]
        gates = -0.1 * torch.rand(*shape, device="cuda")
        scales = [torch.rand(*shape, levels, device="cuda").requires_grad_()] if levels else []
        return tensors + [gates.requires_grad_()] + scales

    try:
        from fla.ops.simple_gla import chunk_simple_gla

        rows.append(
            time_peer(
                torch,
                "fla Mamba-2 (simple GLA)",
                lambda: make(0),
                lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g),
                repetitions,
            )
        )
    except ImportError as error:
        print(f"skipped: fla simple GLA: {error}")
    try:
        from fla.ops.log_linear_attn import chunk_log_linear_attn

        rows.append(
            time_peer(
                torch,
                "fla log-linear attention",
                lambda: make(1 + (length - 1).bit_length()),
                lambda q, k, v, g, scales: chunk_log_linear_attn(q, k, v, g=g, level_scales=scales),
                repetitions,
            )
        )
    except ImportError as error:
        print(f"skipped: fla log-linear attention: {error}")
    return rows


def time_loglin(command, length, repetitions):
    arguments = [command, "bench", "--suite", "paper", "--json", "--repetitions", str(repetitions)]
    names = [f"forward-{length}", f"both-{length}"]
    for name in names:
        arguments += ["--row", name]
    result = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=False)
    if not result.stdout:
        print(f"skipped: loglin at T = {length}: exit status {result.returncode}")
        return None
    report = json.loads(result.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    for row in rows.values():
        if "note" in row:
            print(f"loglin {row['name']}: {row['note']}")
    label = f"loglin ({rows[names[0]].get('engine', 'no engine')}) on {report['device']}"
    return (label, *(rows[name].get("value") for name in names))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loglin", default="build/release/loglin")
    parser.add_argument("--lengths", default="2048,8192,16384")
    parser.add_argument("--repetitions", type=int, default=21)
    options = parser.parse_args()
    try:
        import torch

        torch = torch if torch.cuda.is_available() else None
        if torch is None:
            print("skipped: PyTorch and fla: no CUDA device")
    except ImportError as error:
        torch = None
        print(f"skipped: PyTorch and fla: {error}")
    table = []
    for length in (int(text) for text in options.lengths.split(",")):
        rows = [time_loglin(options.loglin, length, options.repetitions)]
        if torch is not None:
            rows += [time_attention(torch, length, options.repetitions)]
            rows += time_fla(torch, length, options.repetitions)
        table += [(length, row) for row in rows if row is not None]
    print(f"{'T':>8}  {'forward ms':>11}  {'both ms':>11}")
    for length, (name, *times) in table:
        texts = ["-" if time is None else f"{time:.3f}" for time in times]
        print(f"{length:>8}  {texts[0]:>11}  {texts[1]:>11}  {name}")


if __name__ == "__main__":
    main()
