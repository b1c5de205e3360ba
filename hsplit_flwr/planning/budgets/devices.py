"""Budgets of typical devices by name, for simulations and for clients that state ``device="phone"``.

Peaks are 32-bit arithmetic from data sheets; half precision on tensor cores is faster: state ``gflops`` then.
Sustained = peak x an *assumed* utilisation: 0.4 on GPUs (PaLM reports 0.46 for a tuned training,
https://arxiv.org/abs/2204.02311, 2022), 0.3 on CPUs (HPL reaches 0.39 of a Raspberry Pi 5's peak, see there; training
is not all matrix products).
Memory for training is *assumed*: what an operating system, a display and an idle client leave of the memory fitted.

Links: *mobile* and *fixed* are the world's mean download, upload and ping of August 2021 by Ookla's Speedtest Global
Index (https://www.indiatoday.in/technology/news/story/india-records-its-highest-average-broadband-speed-of-62-45mbps-
in-august-as-per-ookla-1853849-2021-09-17): 56.74 and 12.61 Mbit/s, 37 ms; 110.24 and 60.13 Mbit/s, 19 ms; latency is
half of the ping. *wired* is Gigabit Ethernet at an *assumed* 0.94 (headers) and 0.5 ms.

==================  ================================================================================================
phone               Snapdragon 8 Gen 2, 8 GB. CPU cores and clocks: https://www.notebookcheck.net/SD-8-Gen-2-vs-SD-865-
                    Plus_14645_12716.247596.0.html (2022): one X3 at 3.2 GHz, four A715/A710 at 2.8 GHz. With 4 and 2
                    128-bit FMA pipes (Arm's core manuals; *not looked up again*): 3.2 x 32 + 4 x 2.8 x 16 = 282
                    GFLOP/s; its GPU is not counted, PyTorch does not train there. Memory *assumed*: 2 GB, as an
                    Android phone with 8 GB kills apps that reach 4 to 5 GB
                    (https://xckevin.com/en/blog/android-on-device-ai-memory-kv-cache/). Link: mobile.
raspberry-pi-5      8 GB, four Cortex-A76 at 2.4 GHz, two 128-bit FMA pipes each: 4 x 2.4 x 16 = 154 GFLOP/s
                    (https://docs.zephyrproject.org/4.0.0/boards/raspberrypi/rpi_5/doc/index.html, 2024; pipes:
                    https://www.systemonchips.com/arm-cortex-a76-floating-point-performance-analysis-and-optimization).
                    HPL in 64 bits, whose peak is half of that, measures 30.2 GFLOP/s
                    (https://github.com/geerlingguy/top500-benchmark/issues/18, 2023). 6 GB *assumed*. Link: fixed.
jetson-orin-nano    8 GB shared by CPU and GPU, 1,024 CUDA cores at 625 MHz: 2 x 1024 x 0.625 = 1,280 GFLOP/s (NVIDIA
                    Jetson Orin Nano data sheet DS-11105, 2023; https://www.scribd.com/document/673174036).
                    6 GB *assumed*. Link: fixed.
laptop-gpu          GeForce RTX 4070 Laptop: 4,608 CUDA cores, 8 GB (https://www.nvidia.com/en-us/geforce/gaming-laptops/
                    compare, 2023); at 60 W 1.62 GHz: 14.9 TFLOP/s (https://hmc-tech.com/gpu/nvidia-geforce-rtx-4070-
                    laptop-60w-vs-nvidia-geforce-rtx-4070-max-q). 7 GB *assumed*. Link: fixed.
workstation         GeForce RTX 4090: 16,384 CUDA cores at 2.52 GHz, 82.6 TFLOP/s, 24 GB
                    (https://www.notebookcheck.net/NVIDIA-GeForce-RTX-4090.677670.0.html, 2022). 22 GB *assumed*.
                    Link: wired.
datacenter-gpu      For the server. H100 SXM: 67 TFLOP/s, 80 GB (https://www.nvidia.com/en-us/data-center/h100/, 2023).
                    76 GB *assumed*. Link: wired.
==================  ================================================================================================
"""

from collections.abc import Mapping

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.budgets.budget import Budget

GPU_UTILISATION = 0.4
CPU_UTILISATION = 0.3
_MBPS = 1e6 / 8
_MOBILE = (12.61 * _MBPS, 56.74 * _MBPS, 0.037 / 2)
_FIXED = (60.13 * _MBPS, 110.24 * _MBPS, 0.019 / 2)
_WIRED = (940 * _MBPS, 940 * _MBPS, 0.0005)

DEVICES: Mapping[str, Budget] = {
    "phone": Budget(2_000_000_000, CPU_UTILISATION * 282e9, *_MOBILE),
    "raspberry-pi-5": Budget(6_000_000_000, CPU_UTILISATION * 154e9, *_FIXED),
    "jetson-orin-nano": Budget(6_000_000_000, GPU_UTILISATION * 1.28e12, *_FIXED),
    "laptop-gpu": Budget(7_000_000_000, GPU_UTILISATION * 14.9e12, *_FIXED),
    "workstation": Budget(22_000_000_000, GPU_UTILISATION * 82.6e12, *_WIRED),
    "datacenter-gpu": Budget(76_000_000_000, GPU_UTILISATION * 67e12, *_WIRED),
}


def device_budget(name: object) -> Budget:
    """The budget of the device `name`.

    Raises:
        ConfigError: no device of that name.
    """
    if not isinstance(name, str) or name not in DEVICES:
        raise ConfigError(
            f"Expected device as one of {', '.join(DEVICES)}, found {name!r}. "
            "Or state memory, compute and link in its place."
        )
    return DEVICES[name]
