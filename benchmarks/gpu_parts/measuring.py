"""What the parts measure with and what they yield: seconds, the profiler's counts, peak memory, the chip's ceilings.

def part(settings: Settings) -> Iterator[Measured]:
    yield from attempt("search, 64 questions", "ours", lambda: {"ms": 1e3 * seconds_of(call, settings.device)})
"""

import gc
import statistics
import time
import traceback
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rag.errors import one_line

# Of the profiler's names: calls that wait for the device. Copies from pageable memory make the first of them, too.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Settings:
    """Where and how large it is measured."""

    device: str  # cuda; cpu for a trial
    short: bool  # sizes at which nothing is measured, only tried
    folder: Path  # scratch

    @property
    def size(self) -> str:
        """BART's, as the other benchmarks name it."""
        return "small" if self.short else "large"

    @property
    def batches(self) -> tuple[int, int]:
        """Questions of a training step or of a call for answers."""
        return (1, 2) if self.short else (16, 64)

    @property
    def answer_batches(self) -> tuple[int, int]:
        return (1, 2) if self.short else (8, 64)


@dataclass
class Measured:
    """What was found of one case: figures by name, or a "problem"."""

    case: str
    side: str  # ours, public, or chip for what is a property of the machine
    figures: dict[str, float | str]


def attempt(case: str, side: str, measure: Callable[[], dict[str, float]]) -> Iterator[Measured]:
    """What `measure` finds or, where it fails, why: what comes behind it is measured all the same."""
    import torch

    try:
        yield Measured(case, side, dict(measure()))
    except Exception as error:  # out of memory, a kernel that this chip lacks
        traceback.print_exc()
        yield Measured(case, side, {"problem": one_line(error, 80)})
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds of one call, until the device is done with it."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def seconds_of(function: Callable[[], object], device: str, calls: int = 5, first: int = 2) -> float:
    """The median of some calls, behind `first` ones that do not count."""
    for _ in range(first):
        function()
    return statistics.median(timed(function, device) for _ in range(calls))


def profiled(function: Callable[[], object], device: str, calls: int = 1, with_host: bool = False) -> dict[str, float]:
    """What the profiler counts of some calls of a function, for each of them.

    Args:
        with_host: count torch's operators, too, which slows the calls down.

    Returns:
        kernels; device_reads (copies to the host); waits (for the device); busy (share of the time in which the device
        worked); and scalars (numbers that the host asked the device for), with the host's operators.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CUDA] * on_gpu + [ProfilerActivity.CPU] * (with_host or not on_gpu)
    synchronize(device)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        seconds = time.perf_counter() - start
    names, spans, numbers, waits = Counter(), [], [], []
    # As the profiler holds them: torch's own list of events takes seconds to be made.
    for event in profiler.profiler.kineto_results.events():
        if event.is_user_annotation() or event.name().startswith("Optimizer."):
            continue
        is_work = event.device_type() == DeviceType.CUDA
        names[("device " if is_work else "") + event.name()] += 1
        span = event.start_ns(), event.start_ns() + event.duration_ns()
        if is_work:
            spans.append(span)
        elif event.name() == "aten::_local_scalar_dense":
            numbers.append(span)
        elif event.name().startswith(WAITS):
            waits.append(span[0])

    def count(*beginnings: str) -> int:
        return sum(number for name, number in names.items() if name.startswith(beginnings))

    counts: dict[str, float] = {
        "kernels": count("device ") - count("device Memcpy", "device Memset"),
        "device_reads": count("device Memcpy DtoH"),
        "waits": count(*WAITS),
    }
    if with_host:
        counts["scalars"] = holding(numbers, waits)  # in which is no wait, those are of the host's own tensors
    return {name: number / calls for name, number in counts.items()} | {"busy": covered(spans) / 1e9 / seconds}


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def holding(spans: list[tuple[float, float]], instants: list[float]) -> int:
    """In how many intervals there is an instant."""
    instants = sorted(instants)
    return sum(bisect_left(instants, start) < bisect_left(instants, end) for start, end in spans)


def start_peak(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.init()  # which nothing may have done yet
        torch.cuda.reset_peak_memory_stats()


def peak_mib(device: str) -> float:
    """The most that tensors held on the device since `start_peak`; of this process on a CPU."""
    import torch

    from benchmarks.machine import status_mib

    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else status_mib("VmHWM")


# --- The chip ---------------------------------------------------------------------------------------------------------


def ceilings(settings: Settings) -> Iterator[Measured]:
    """What no kernel of ours can beat: matrix products, a copy on the device, a copy to it from pinned memory."""
    import torch

    device, side = settings.device, 256 if settings.short else 8192

    def product(dtype: torch.dtype, side: int) -> float:
        matrix = torch.randn(side, side, device=device).to(dtype)
        return 2 * side**3 / seconds_of(lambda: matrix @ matrix, device, calls=9) / 1e12

    def copies() -> dict[str, float]:
        size = 2**20 if settings.short else 2**31
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        pinned = torch.zeros(size // 4, dtype=torch.uint8, pin_memory=device == "cuda")
        landing = source[: len(pinned)]
        on_device = seconds_of(lambda: target.copy_(source), device, calls=9)
        to_device = seconds_of(lambda: landing.copy_(pinned, non_blocking=True), device)
        return {"copy_tb": 2 * size / on_device / 1e12, "bus_gb": len(pinned) / to_device / 1e9}

    yield from attempt("chip", "chip", lambda: {"bf16_tflops": product(torch.bfloat16, side)})
    yield from attempt("chip", "chip", lambda: {"fp32_tflops": product(torch.float32, side // 2)})
    yield from attempt("chip", "chip", copies)
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        yield Measured("chip", "chip", {"name": properties.name, "memory_gib": properties.total_memory / 2**30})
