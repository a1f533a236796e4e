"""What some work allocates on the CPU."""

import torch


def allocations(work):
    """(largest single tensor, peak of all that was alive), in bytes, of what `work` allocates on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for size in sizes:
        alive += size
        peak = max(peak, alive)
    return max(sizes, default=0), peak
