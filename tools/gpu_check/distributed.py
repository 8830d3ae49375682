"""Started by torchrun: explains a model inside of DistributedDataParallel; prints JSON."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from captum_reflected import MaskRegression
from gpu_check.accuracy import deviation
from gpu_check.precision import tf32
from gpu_check.state import ATTRIBUTORS, small_model


def main(kind: str) -> None:
    """Prints the backend, and how far maps are from those of the model itself.

    Args:
        kind: the type of the device.
    """
    on_gpu = kind == "cuda"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device(kind)
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, device_id=device if on_gpu else None)
    try:
        worst = 0.0
        with tf32(device, enabled=False):
            for attributor in ATTRIBUTORS:
                model, images = small_model(device)
                options = {"baselines": 0.0} if attributor is MaskRegression else {}
                expected = attributor(model).attribute(images, 1, **options)
                wrapped = DistributedDataParallel(model)
                found = attributor(wrapped).attribute(images, 1, **options)
                everywhere = found.clone()
                dist.all_reduce(everywhere)
                worst = max(worst, deviation(everywhere / dist.get_world_size(), expected))
    finally:
        dist.destroy_process_group()
    print(json.dumps({"backend": backend, "off": worst}))


if __name__ == "__main__":
    main(sys.argv[1])
