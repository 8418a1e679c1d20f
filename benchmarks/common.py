"""What the benchmarks share: the clock, the machine's description, comma-separated options."""

import argparse
import functools
import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

# Calls in a CUDA graph at least, so that starting it, which takes as long as a small call, does not count.
GRAPH_CALLS = 32


def seconds(function: Callable[[], object], calls: int = 1) -> float:
    """Mean wall time of a call, over `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def graph_seconds(calls: list[Callable[[], object]]) -> Callable[[], float]:
    """A CUDA graph of the calls; what is returned replays it, and gives the device's mean seconds of a call."""
    calls = calls * math.ceil(GRAPH_CALLS / len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)

    replay()
    return replay


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def fractions(text: str) -> list[float]:
    """Comma-separated numbers in (0, 1]."""
    numbers = [float(part) for part in text.split(",")]
    if not all(0 < number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"expected numbers in (0, 1], got {text}")
    return numbers


def choices(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names among `known`."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected names among {', '.join(known)}, got {name}")
        return text.split(",")

    return parse


def today() -> str:
    return time.strftime("%Y-%m-%d")


def machine(device: str = "cpu") -> str:
    """The torch version and the processor or the GPU, for the first line of a table."""
    if device == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    return f"torch {torch.__version__}, {processor()}, {os.cpu_count()} CPUs"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join([*names[:1], platform.machine()])


@functools.cache
def last_level_cache_bytes(device: str = "cpu") -> int:
    """Bytes of all last-level CPU caches together, 64 MiB where the system does not say; or of the GPU's L2 cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    caches = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level, size, sharers = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
        except OSError:
            continue
        caches[int(level), sharers] = int(size.removesuffix("K")) * 1024
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or 64 * 2**20


def available_memory_bytes(device: str = "cpu") -> int:
    """Memory that can be taken without swapping; half of the machine's where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
