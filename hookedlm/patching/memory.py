"""How much fits into memory at once."""

from __future__ import annotations

from pathlib import Path

import torch

from hookedlm.model import HookedTransformer

SHARE = 0.3
"""Of the memory that is free, what a batch may take."""
CPU_BYTES = 3 * 2**22
"""Of the widest activation of a batch; more makes a CPU no faster: its caches overflow, and memory
is fetched anew from the system each time."""
UNKNOWN = 2 * 2**30
"""Bytes taken to be free where nobody tells."""


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = Path("/proc/meminfo")
    if device.type == "cpu" and told.is_file():
        lines = dict(line.split(":") for line in told.read_text("ascii").splitlines())
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return UNKNOWN


def most_tokens(model: HookedTransformer, read_all: bool = False) -> int:
    """How many positions a batch may have. ``read_all``: the logits of all of them are computed."""
    cfg, device = model.cfg, model.device
    width = 10 * cfg.d_model + 4 * (cfg.d_mlp or 0) + 6 * cfg.n_heads * cfg.d_head
    width += cfg.d_vocab * 2 if read_all else 0
    size = torch.finfo(cfg.dtype).bits // 8
    room = int(SHARE * free_bytes(device)) // (width * size)
    if device.type == "cpu":
        room = min(room, CPU_BYTES // (max(cfg.d_mlp or 0, cfg.d_model) * size))
    return max(1, room)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that there was no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error)
