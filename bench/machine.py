"""What the machine can do at best: the yardstick of the benchmarks' utilisation figures."""

import time


def matmul_rate(precision: str, *, device: str, size: int = 2048) -> float:
    """Operations per second of a large matrix product: the best of a few."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
