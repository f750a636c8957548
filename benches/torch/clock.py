"""Time, as both sides take it."""

import time

import torch


def wait(device):
    if device != "cpu":
        torch.cuda.synchronize()


def block(run, seconds, device, least=3):
    """Milliseconds of each call of `run` for about so many seconds; every call ends with its result at hand."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def calls(run, seconds, device, flush, least=3):
    """Milliseconds of each call; on a GPU between two events, while the host runs ahead, after `flush` bytes were written
    over what the second-level cache holds."""
    if device == "cpu":
        return block(run, seconds, device, least)
    over = torch.empty(flush // 4, dtype=torch.int32, device=device)
    for _ in range(2):
        run()
    pairs, end, times = 16, time.perf_counter() + seconds, []
    while not times or time.perf_counter() < end:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(pairs)]
        for start, stop in events:
            over.zero_()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(stop) for start, stop in events]
    return times
