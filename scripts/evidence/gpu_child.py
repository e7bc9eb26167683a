"""What runs under compute-sanitizer and Nsight Compute: a few kernel launches, and nothing that is not asked about.

    python scripts/evidence/gpu_child.py cases       six cases against fp64; exits with 1 if one is wrong
    python scripts/evidence/gpu_child.py decode      launches of one benchmark point
    python scripts/evidence/gpu_child.py prefill
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evidence.checkout import alias_packages

CASES = 6
LAUNCHES = 3  # the first compiles and loads
POINTS = {"decode": (16, 1, 32768), "prefill": (1, 8192, 8192)}  # batch, new tokens, length


def small_cases() -> list:
    """Shapes of every kind, short: a sanitizer slows a kernel down by a factor of tens."""
    import torch
    from gqa_plugins.grouped_attention.gpu_correctness import Case

    decode, prefill = ((70, 1), (0, 1)), ((0, 40), (33, 9))
    return [Case(8, 2, 64, 64, torch.bfloat16, decode, 1), Case(8, 2, 64, 64, torch.float16, prefill, 40),
            Case(4, 1, 128, 128, torch.bfloat16, prefill, 40, window=17, rotary=64),
            Case(4, 1, 128, 128, torch.bfloat16, decode, 1, softcap=30.0, sinks=True),
            Case(4, 2, 40, 40, torch.float32, ((65, 2), (1, 1)), 2), Case(3, 1, 192, 128, torch.float16, decode, 1)]


def run_cases() -> int:
    """Each through both kernels."""
    import torch
    from gqa_plugins.grouped_attention import gpu_correctness

    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    torch.manual_seed(0)
    rows = [row for case in small_cases()[:CASES] for row in gpu_correctness.check(case, device, major * 10 + minor)]
    return int(not all(row["passed"] for row in rows))


def run_point(kind: str) -> int:
    """Attention alone, at 32/8 heads of 128, bf16."""
    import torch
    from gqa_plugins.grouped_attention import grouped_query_attention

    batch, steps, length = POINTS[kind]
    device = torch.device("cuda")
    query = torch.randn(batch, steps, 32 * 128, device=device, dtype=torch.bfloat16)
    cache = [torch.randn(batch, 8, length, 128, device=device, dtype=torch.bfloat16) for _ in range(2)]
    past = torch.full((batch,), length - steps, dtype=torch.int32, device=device)
    for _ in range(LAUNCHES):
        grouped_query_attention(query, None, None, *cache, past, num_heads=32, kv_num_heads=8, scale=128**-0.5,
                                max_length=length)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    alias_packages()
    sys.exit(run_cases() if sys.argv[1] == "cases" else run_point(sys.argv[1]))
