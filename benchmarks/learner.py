"""One full update (world model, reward head, actor, critic) against the reference's and r2dreamer's, on the CPU.

Each rival runs in a process of its own, with the same number of threads, on one random batch of 64×64 images; they
take turns, an update each, so that the machine's moods fall on all. All compute in float32; `ours-plain` does without
the kernels in C. The reference runs at the same architecture (its gate layout, its actions
padded to 21, imagination from every state of the batch). r2dreamer has an architecture of its own, brought to the same
number of trainable weights; it learns its actor by REINFORCE, so that nothing flows back through its imagination. The
last row is ours in bfloat16, where the processor has units for it: for information, no goal; the reference has half
precision on CUDA alone.

Speeds are by the wall clock; the seconds of CPU beside them, with the ratio of those, are what a busy machine disturbs
least. Memory is the peak of the whole process. Where the time goes is measured part by part, forward and backward,
against the floor that its matrix products and convolutions have at the best rate of a matrix product in this run. Then
the products and convolutions of our update are computed alone, in their own shapes, from the cache as far as they fit
(`products_s`): the reference's time over that is the most that a rewrite around the same libraries could gain, if all
else cost nothing.

Where there is a GPU, ours with CUDA graphs and without races the reference there too, with peak memory of the GPU;
without one that is skipped, aloud.

`--paper-step 1` takes one optimiser step of pre-training at the paper's size instead, and tells its peak memory.

Checkouts: GSA_PEER_NCRL, GSA_PEER_R2DREAMER. One that is missing is left out, aloud.

    python -m benchmarks.learner [--quick] [--save] [--threads 2] [--rounds 5] [--paper-step 1]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import sys
import time
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.rivals import Case, parts, r2dreamer, reference
from benchmarks.rivals.worker import Rival
from gsa.agent.precision import fast_bfloat16
from learner.graphs import WARM_UP

SPEED, R2_SPEED = 2.0, 1.2  # times the rivals' frames per second


def main() -> int:
    options = harness.arguments(__doc__, {"--threads": os.cpu_count() or 1, "--rounds": 0, "--paper-step": 0})
    torch.set_num_threads(int(options.threads))
    if options.paper_step:
        return harness.finish("learner-paper-step", paper_step(options), {}, options)
    result: dict[str, Any] = {"threads": int(options.threads), "gemm_gflops_per_s": round(parts.gemm_rate(), 1)}
    goals: dict[str, dict[str, Any]] = {}
    for size, batch, length, rounds in sizes(options.quick):
        case = Case(size, batch, length)
        result[size] = {"batch": batch, "length": length, **race(case, int(options.rounds) or rounds, options)}
        result[size]["parts"] = breakdown(case, 1 if options.quick else 3, result["gemm_gflops_per_s"])
        alone = parts.products_alone(case, 1 if options.quick else 5)
        result[size]["products_s"] = round(alone, 4)
        if "reference" in result[size]:
            result[size]["reference_over_products"] = round(result[size]["reference"]["seconds"] / alone, 2)
        goals |= judge(size, result[size])
    if torch.cuda.is_available():
        result["cuda"] = on_cuda(options)
    else:
        print("No GPU: the update on CUDA (CUDA graphs, bfloat16) is not measured.", file=sys.stderr)
    return harness.finish("learner", result, goals, options)


def sizes(quick: bool) -> list[tuple[str, int, int, int]]:
    """(size, batch, length, rounds)."""
    return [("tiny", 4, 16, 1)] if quick else [("tiny", 16, 64, 7), ("small", 16, 64, 3), ("reference-small", 8, 32, 5)]


def race(case: Case, rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    """Every rival's seconds, frames a second and memory."""
    ours = Rival("benchmarks.rivals.ours", case, int(options.threads))
    rivals = {"ours": ours, **_peers(case, ours.built["parameters"], int(options.threads))}
    others = {"ours-plain": dataclasses.replace(case, compile="off")}
    if fast_bfloat16(torch.device(case.device)):
        others["ours-bfloat16"] = dataclasses.replace(case, precision="bfloat16")
    for name, other in others.items():
        rivals[name] = Rival("benchmarks.rivals.ours", other, int(options.threads))
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in rivals}

    def turn(name: str) -> None:
        answers[name].append(rivals[name].update())

    try:
        for _ in range(WARM_UP + 2 if case.device == "cuda" else 0):
            for name in rivals:
                rivals[name].update()
        harness.interleaved({name: lambda name=name: turn(name) for name in rivals}, rounds)
    finally:
        for rival in rivals.values():
            rival.close()
    return {name: _row(case, rivals[name], answers[name][1:], answers["ours"][1:]) for name in rivals}


def on_cuda(options: argparse.Namespace) -> dict[str, Any]:
    """The race on a GPU: "ours" replays CUDA graphs, "ours-plain" does not."""
    case = Case("tiny" if options.quick else "reference-small", 16, 64, device="cuda")
    return {"device": torch.cuda.get_device_name(), **race(case, 2 if options.quick else 20, options)}


def _peers(case: Case, parameters: int, threads: int) -> dict[str, Rival]:
    found = {}
    for name, module in (("reference", reference), ("r2dreamer", r2dreamer)):
        if not os.environ.get(module.VARIABLE):
            print(f"{name} is left out: {module.VARIABLE} names no checkout.", file=sys.stderr)
        elif name == "reference" or (
            case.size == "reference-small" and case.device == "cpu"
        ):  # r2dreamer is not smaller
            same = dataclasses.replace(case, parameters=parameters)
            found[name] = Rival(module.__name__, same, threads)
    return found


def _row(case: Case, rival: Rival, rounds: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    wall, cpu, our_wall, our_cpu = (
        [answer[clock] for answer in which] for which in (rounds, ours) for clock in ("seconds", "cpu_seconds")
    )
    return {
        "parameters": rival.built["parameters"],
        "seconds": round(float(np.median(wall)), 4),
        "frames_per_s": round(case.batch * case.length / float(np.median(wall)), 1),
        "cpu_seconds": round(float(np.median(cpu)), 4),
        "peak_mb": round(rounds[-1]["peak_mb"]),
        "our_speedup": round(harness.ratio(our_wall, wall), 3),
        "our_cpu_speedup": round(harness.ratio(our_cpu, cpu), 3),
    }


def breakdown(case: Case, rounds: int, rate: float) -> dict[str, Any]:
    """Part → seconds, 10⁹ floating-point operations, and how many times the floor that is."""
    calls = parts.parts(case)
    work = {name: parts.gigaflops(call) for name, call in calls.items()}
    seconds = harness.interleaved(calls, rounds)
    rows = {
        name: {"seconds": round(float(np.median(seconds[name])), 4), "gflop": round(work[name], 2)} for name in calls
    }
    for row in rows.values():
        row["floor_s"] = round(row["gflop"] / rate, 4)
    return rows


def judge(size: str, rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    goals = {}
    if "reference" in rows:
        goals[f"{size}_speed_over_reference"] = harness.at_least(rows["reference"]["our_speedup"], SPEED)
        memory = rows["reference"]["peak_mb"] / rows["ours"]["peak_mb"]
        goals[f"{size}_reference_memory_over_ours"] = harness.at_least(memory, 1.0)
    if "r2dreamer" in rows:
        goals[f"{size}_speed_over_r2dreamer"] = harness.at_least(rows["r2dreamer"]["our_speedup"], R2_SPEED)
    return goals


def paper_step(options: argparse.Namespace) -> dict[str, Any]:
    """One optimiser step of pre-training at the paper's size, 281,384,259 weights."""
    from benchmarks.rivals.ours import batch
    from gsa.agent.sizes import preset
    from gsa.agent.world_model import TensorBatch, WorldModel
    from learner.config import OptimiserConfig
    from learner.optimiser import Optimiser

    case = Case("paper", 2 if options.quick else 8, 8 if options.quick else 64)
    model = WorldModel.create(preset("paper").world_model, 0)
    optimiser = Optimiser("world_model", model.named_parameters(), OptimiserConfig())
    before = next(iter(model.parameters())).detach().clone()
    started = time.perf_counter()
    loss, _, watched = model.loss(TensorBatch.from_batch(batch(case)), torch.Generator().manual_seed(0))
    metrics = optimiser.step(loss)
    seconds = time.perf_counter() - started
    assert optimiser.steps == 1 and not torch.equal(before, next(iter(model.parameters()))), "no step was taken"
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": case.batch,
        "length": case.length,
        "precision": "bfloat16" if fast_bfloat16(torch.device("cpu")) else "float32",
        "seconds": round(seconds, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "recon": float(watched["recon"]),
        **metrics,
    }


if __name__ == "__main__":
    sys.exit(main())
