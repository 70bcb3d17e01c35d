"""An exported network in onnxruntime against the same network with its involutions unfolded: agreement, time, memory.

    python experiments/onnx_network.py rednetv2_50        a line of docs/deploy.md

The unfolded network is what implementations without an operator of their own can export. Kernels are random, not the
identity that training begins with. Time is that of the process's own CPU, one thread, in interleaved rounds; memory is
what two calls need in a fresh process beyond the loaded network.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from onnx_formulations import peak, session

import involution.zoo
from involution.bench.memory import unfold_involutions
from involution.export import to_onnx, trace

assert involution.zoo  # registers the networks


def images(side: int) -> dict[str, np.ndarray]:
    """One image, normalised."""
    return {"images": np.random.default_rng(0).standard_normal((1, 3, side, side), dtype=np.float32)}


def print_memory(file: Path, side: int) -> None:
    """How many MiB this process needs at its peak beyond the loaded network."""
    run = session(file)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak, which loading has raised, to the present size
    before = peak()
    for _ in range(2):
        run.run(None, images(side))
    print(peak() - before)


def compare(name: str, side: int, rounds: int, folder: Path) -> None:
    """Exports both, compares their outputs with torch's, and prints times and memory."""
    torch.manual_seed(0)
    given = images(side)
    example = torch.from_numpy(given["images"])
    network = timm.create_model(name, kernel_init="paper", zero_init_last=False).eval()
    with torch.no_grad():
        wanted = network(example).numpy()
    if not np.isfinite(wanted).all():
        raise SystemExit(f"network must give finite logits with random kernels, got {name}: take a rednetv2")
    files = {"involution export --static": folder / "ours.onnx", "unfold, exported": folder / "unfold.onnx"}
    ours, theirs = files.values()
    to_onnx(trace(network, example, ()), ours, ["logits"])
    unfold_involutions(network)
    with torch.no_grad():
        torch.onnx.export(network, (example,), theirs, dynamo=True, verbose=False, input_names=["images"])
    runs = {kind: session(file) for kind, file in files.items()}
    for kind, run in runs.items():
        apart = np.abs(run.run(None, given)[0] - wanted).max() / np.abs(wanted).max()
        print(f"{name} {kind}: largest difference to torch, of the largest logit: {apart:.1e}", flush=True)
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(rounds):
        for kind, run in runs.items():
            start = time.process_time()
            run.run(None, given)
            times[kind].append(time.process_time() - start)
    a, b = times.values()
    ratios = sorted(second / first for first, second in zip(a, b, strict=True))
    for kind, file in files.items():
        command = [sys.executable, __file__, name, "--memory", str(file), "--side", str(side)]
        memory = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{name} {kind}: {1e3 * statistics.median(times[kind]):.0f} ms, {memory:.0f} MiB", flush=True)
    middle, low, high = statistics.median(ratios), ratios[0], ratios[-1]
    print(f"{name}: unfold's time over the export's: {middle:.2f} ({low:.2f} to {high:.2f}), median of {rounds}")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a RedNet of timm's registry")
    parser.add_argument("--side", type=int, default=224, help="height and width of the image")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)  # one file, in a fresh process
    options = parser.parse_args()
    if options.memory:
        print_memory(options.memory, options.side)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(options.network, options.side, options.rounds, Path(folder))


if __name__ == "__main__":
    main()
