"""What this machine multiplies: FLOP/s of a large bfloat16 matrix product, as JSON on stdout.

The denominator of MFU, measured with the threads and in the minutes of the run that it is for.
"""

import json
import sys
import time

SIZE = 2048  # operands of 8 MiB
ROUNDS = 20


def main() -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4 * SIZE if device == "cuda" else SIZE
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(left)
    best = {"cpu": float("inf"), "wall": float("inf")}
    for _ in range(ROUNDS):
        cpu, wall = time.process_time(), time.perf_counter()
        torch.matmul(left, right, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        best["cpu"] = min(best["cpu"], time.process_time() - cpu)
        best["wall"] = min(best["wall"], time.perf_counter() - wall)
    found = {name: 2 * size**3 / seconds for name, seconds in best.items()}
    json.dump(found | {"threads": torch.get_num_threads(), "torch": torch.__version__}, sys.stdout)


if __name__ == "__main__":
    main()
