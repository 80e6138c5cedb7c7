"""What is installed here, told without importing it: packages, their versions, the CUDA driver."""

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

# module to look for -> how to get it; a need outside this table is named as it stands
INSTALL = {
    "torch": "pip install torch",
    "triton": "pip install 'glabench[gpu]'",
    "flash_attn": "pip install 'glabench[peers]' --no-build-isolation",
    "mamba_ssm": "pip install 'glabench[peers]' --no-build-isolation",
    "causal_conv1d": "pip install 'glabench[peers]' --no-build-isolation",
    "fla": "pip install 'glabench[peers]' --no-build-isolation",
    "flash_attn.cute": "pip install flash-attn-4",
    "cutlass": "pip install nvidia-cutlass-dsl",
    "transformers": "pip install 'glabench[models]'",
    "safetensors": "pip install 'glabench[models]'",
    "lm_eval": "pip install 'glabench[eval]'",
    "liger_kernel": "pip install 'glabench[gpu]'",
    "cuda": "a machine with an NVIDIA GPU and a CUDA build of torch",
}
DISTRIBUTIONS = {
    "fla": "flash-linear-attention",
    "liger_kernel": "liger-kernel",
    "flash_attn": "flash-attn",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "flash_attn.cute": "flash-attn-4",
    "cutlass": "nvidia-cutlass-dsl",
}


@functools.cache
def is_installed(module: str) -> bool:
    """Whether `module` (dotted allowed) can be found, without importing the leaf."""
    try:
        return importlib.util.find_spec(module.split(".")[0]) is not None and (
            "." not in module or _has_submodule(module)
        )
    except (ImportError, ValueError):
        return False


def _has_submodule(module: str) -> bool:
    """Look on disk: find_spec would import the parents, and with them torch."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    return any(
        (Path(root, *rest).is_dir() or Path(root, *rest).with_suffix(".py").is_file())
        for root in (spec.submodule_search_locations or ())
    )


@functools.cache
def installed_version(module: str) -> str:
    """The installed version of the distribution that brings `module`, or "none"."""
    name = DISTRIBUTIONS.get(module, module.split(".")[0])
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def has_cuda() -> bool:
    """Whether the driver sees a GPU and torch is a CUDA build; neither is imported."""
    return cuda_device_count() > 0 and torch_cuda_version() is not None


def no_fused_operations(device: str) -> str | None:
    """Why Liger-Kernel cannot serve on `device`, or None. Triton's interpreter counts as a GPU: for tests."""
    if not is_installed("liger_kernel"):
        return f"Liger-Kernel is not installed: {INSTALL['liger_kernel']}"
    if not device.startswith("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        return "Liger-Kernel needs a GPU"
    return None


def _driver_library() -> str:
    return "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"


@functools.cache
def cuda_device_count() -> int:
    """Number of GPUs the NVIDIA driver reports, 0 without one."""
    try:
        driver = ctypes.CDLL(_driver_library())
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@functools.cache
def cuda_device_name(index: int) -> str | None:
    """The driver's name of a GPU, such as "NVIDIA H100 80GB HBM3"."""
    if index >= cuda_device_count():
        return None
    driver = ctypes.CDLL(_driver_library())
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(128)
    if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetName(name, len(name), device):
        return None
    return name.value.decode("utf-8", "replace")


def device_slug(gpu_name: str | None) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100_sxm": the folder and the `device` column."""
    if not gpu_name:
        return "cpu"
    words = re.sub(r"NVIDIA|GeForce|Tesla|\(R\)", " ", gpu_name)
    # only the SXM board carries HBM3 under the plain name H100; the PCIe and NVL boards say so
    form = (
        "_sxm" if "H100" in words and "HBM3" in words and "NVL" not in words and "PCIe" not in words else ""
    )
    words = re.sub(r"\b\d+\s*GB\b|\bHBM\w*", " ", words)
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_") + form


@functools.cache
def cuda_capability(index: int = 0) -> tuple[int, int] | None:
    """Compute capability that the driver reports for a GPU, such as (9, 0), or None without one."""
    if index >= cuda_device_count():
        return None
    driver = ctypes.CDLL(_driver_library())
    device, found = ctypes.c_int(0), (ctypes.c_int(0), ctypes.c_int(0))
    if driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    for attribute, value in zip((75, 76), found, strict=True):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return found[0].value, found[1].value


@functools.cache
def torch_cuda_version() -> str | None:
    """CUDA version torch was built for, read from its version file; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        text = Path(spec.submodule_search_locations[0], "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


def import_leaf(module: str) -> ModuleType:
    """Import a dotted module without running the packages above it.

    For peers whose top package imports all their models, and with them transformers: seconds, and an
    ImportError where its version does not suit. The packages above stay in sys.modules as bare stand-ins.
    """
    parents = module.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None or not spec.submodule_search_locations:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            bare = ModuleType(name)
            bare.__spec__, bare.__path__ = spec, list(spec.submodule_search_locations)
            bare.__version__ = installed_version(name)
            sys.modules[name] = bare
            if depth > 1:  # as an import does: others may walk from the top
                setattr(sys.modules[".".join(parents[: depth - 1])], parents[depth - 1], bare)
    return importlib.import_module(module)


@functools.cache
def ptxas_version() -> str | None:
    """Version of the assembler Triton uses: TRITON_PTXAS_PATH, else the one in its package."""
    path = os.environ.get("TRITON_PTXAS_PATH")
    if not path:
        spec = importlib.util.find_spec("triton")
        if spec is None or not spec.submodule_search_locations:
            return None
        path = str(Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "ptxas")
    try:
        text = subprocess.run(
            (path, "--version"), capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"V(\d+(?:\.\d+)+)", text)
    return match.group(1) if match else None
