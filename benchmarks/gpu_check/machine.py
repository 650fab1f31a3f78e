"""Part 1: the versions, the rate of matrix products, and the bandwidth of copies."""

from __future__ import annotations

import subprocess
import time

import torch

from benchmarks import flops, record
from benchmarks.gpu_check.check import Check

QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
ROUNDS = 5


def run(check: Check) -> None:
    """Measure the machine."""
    is_gpu = check.device.type == "cuda"
    check.add("versions", text=", ".join(f"{name} {version}" for name, version in record.versions().items()))
    check.add("device", text=torch.cuda.get_device_name(check.device) if is_gpu else record.machine()["cpu"])
    if is_gpu:
        check.add("driver and clocks", text=query_driver())
        check.add("memory, GiB", value=torch.cuda.get_device_properties(check.device).total_memory / 2**30)
    side = 8192 if is_gpu else 128 if check.shrink else 1024
    for precision in ("bf16", "fp16", "tf32", "fp32") if is_gpu else ("fp32",):
        rate = product_rate(check.device, precision, side)
        stated = flops.datasheet(check.device, precision)
        share = {"share_of_datasheet": rate / stated} if stated else {}
        check.add("product", precision, value=rate / 1e12, **share)
    size = 2**20 if check.shrink else 2**30
    for name, seconds in time_copies(check.device, size).items():
        check.add("copy", name, value=size / seconds / 1e9)


def query_driver() -> str:
    """Return the driver's version and the clocks, as nvidia-smi prints them."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi does not answer"
    values = zip(QUERY.split(","), done.stdout.splitlines()[0].split(", "), strict=False)
    return ", ".join(f"{name} {value}" for name, value in values)


def product_rate(device: torch.device, precision: str, side: int) -> float:
    """Return the FLOP/s of a product of two square matrices."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return flops.product_rate((side, side, side), dtype, device)
    finally:
        torch.set_float32_matmul_precision(before)


def time_copies(device: torch.device, size: int) -> dict[str, float]:
    """Return {name of a copy of `size` bytes: seconds, the best of several}."""
    host, target = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8, device=device)
    sources = {"inside the device": torch.empty_like(target), "host to device": host}
    if device.type == "cuda":
        sources["pinned host to device"] = host.pin_memory()
    now = flops.clock(device)
    found = {}
    for name, source in sources.items():
        times = []
        for _ in range(ROUNDS):
            start = now()
            target.copy_(source, non_blocking=True)
            times.append(now() - start)
        found[name] = max(min(times), time.get_clock_info("perf_counter").resolution)
    return found
