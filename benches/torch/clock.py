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
