#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times what a user would pick instead of loglin, where it is installed, beside `loglin bench --suite paper`.

    bench/peers/compare.py [--loglin build/release/loglin] [--lengths 2048,8192] [--repetitions 21]

Batch 2, 48 heads that share q and k (or not, where a peer cannot), K 128, V 64; at T = 8192 also the delta rule with 16
heads, K = V = 128.  bfloat16, random inputs in turn, medians by CUDA events.  Fetches nothing; what is missing is skipped
with a line that says so.
"""
import argparse
import json
import statistics
import subprocess

BATCH, HEADS, DIM_K, DIM_V = 2, 48, 128, 64
DELTA_HEADS, DELTA_DIM, DELTA_LENGTH = 16, 128, 8192
SETS, WARM_UP = 3, 3


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
    """(name, forward ms, forward + backward ms), with None for what does not run."""

    def output(inputs):
        o = attend(*inputs)
        return o[0] if isinstance(o, tuple) else o

    def forward(inputs):
        with torch.no_grad():
            return output(inputs)

    def both(inputs):
        torch.autograd.grad(output(inputs), inputs, do)

    times = [None, None]
    try:
        sets = [make() for _ in range(SETS)]
        do = torch.randn_like(forward(sets[0]))
        for i, call in enumerate((forward, both)):
            times[i] = median_ms(torch, call, sets, repetitions)
    except Exception as error:  # a peer that does not take the shape must not end the table
        print(f"skipped: {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return name, *times


def random(torch, *shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def random_unit(torch, *shape):
    return torch.nn.functional.normalize(random(torch, *shape), dim=-1).detach().requires_grad_()


def random_floats(torch, low, high, *shape):
    return torch.empty(*shape, device="cuda").uniform_(low, high).requires_grad_()


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


def time_simple_gla(torch, length, repetitions):
    from fla.ops.simple_gla import chunk_simple_gla

    def make():
        shape = (BATCH, length, HEADS)
        q, k, v = (random(torch, *shape, dim) for dim in (DIM_K, DIM_K, DIM_V))
        return q, k, v, random_floats(torch, -0.1, 0.0, *shape)

    return time_peer(torch, "fla Mamba-2 (simple GLA), linear", make, chunk_simple_gla, repetitions)


def time_log_linear(torch, length, repetitions):
    from fla.ops.log_linear_attn import chunk_log_linear_attn

    def make():
        q, k = (random(torch, BATCH, length, 1, DIM_K) for _ in range(2))
        shape = (BATCH, length, HEADS)
        scales = random_floats(torch, 0.0, 1.0, *shape, 1 + (length - 1).bit_length())
        return q, k, random(torch, *shape, DIM_V), random_floats(torch, -0.1, 0.0, *shape), scales

    return time_peer(torch, "fla log-linear attention", make, chunk_log_linear_attn, repetitions)


def time_delta_rule(torch, length, repetitions):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def make():
        shape = (BATCH, length, DELTA_HEADS)
        q, k = (random_unit(torch, *shape, DELTA_DIM) for _ in range(2))
        gates, beta = random_floats(torch, -0.1, 0.0, *shape), random_floats(torch, 0.0, 1.0, *shape)
        return q, k, random(torch, *shape, DELTA_DIM), gates, beta

    return time_peer(torch, "fla gated delta rule, linear", make, chunk_gated_delta_rule, repetitions)


def try_to_time(time_one, *arguments):
    try:
        return time_one(*arguments)
    except ImportError as error:
        print(f"skipped: {time_one.__name__}: {error}")
        return None


def time_loglin(command, prefix, length, repetitions):
    arguments = [command, "bench", "--suite", "paper", "--json", "--repetitions", str(repetitions)]
    names = [f"{prefix}forward-{length}", f"{prefix}both-{length}"]
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
    label = f"loglin{', delta rule' if prefix else ''} ({rows[names[0]].get('engine', 'no engine')}) on {report['device']}"
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
        rows = [time_loglin(options.loglin, "", length, options.repetitions)]
        peers = [time_attention, time_simple_gla, time_log_linear]
        if length == DELTA_LENGTH:
            rows += [time_loglin(options.loglin, "delta-", length, options.repetitions)]
            peers += [time_delta_rule]
        if torch is not None:
            rows += [try_to_time(peer, torch, length, options.repetitions) for peer in peers]
        table += [(length, row) for row in rows if row is not None]
    print(f"{'T':>8}  {'forward ms':>11}  {'both ms':>11}")
    for length, (name, *times) in table:
        texts = ["-" if time is None else f"{time:.3f}" for time in times]
        print(f"{length:>8}  {texts[0]:>11}  {texts[1]:>11}  {name}")


if __name__ == "__main__":
    main()
