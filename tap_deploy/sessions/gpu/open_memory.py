"""Opens the memory of a GPU with the CUDA package that is installed."""

from __future__ import annotations

from tap_deploy.errors import MissingDependencyError, SessionError, first_line
from tap_deploy.sessions.gpu.memory import DeviceMemory


def open_device_memory(device_index: int = 0) -> DeviceMemory:
    """Return the contract on cuda-python, else on pycuda.

    Args:
        device_index: number of the GPU, as CUDA counts them.

    Raises:
        MissingDependencyError: neither package is installed.
        SessionError: there is no such GPU, or no driver.
    """
    # cuda-python first: it is NVIDIA's own, and has CUDA graphs itself.
    from tap_deploy.sessions.gpu.cuda_python import CudaPythonMemory
    from tap_deploy.sessions.gpu.pycuda import PycudaMemory

    reasons = []
    failures: list[SessionError] = []
    for kind in (CudaPythonMemory, PycudaMemory):
        try:
            return kind(device_index)
        except ImportError as exc:  # also a package that does not find its libraries
            reasons.append(f"{kind.name}: {first_line(exc)}")
        except SessionError as exc:  # made for a newer driver: the other one need not be
            failures.append(exc)
    if failures:
        raise failures[0]
    raise MissingDependencyError(
        f"running on a GPU needs cuda-python or pycuda; cannot load {'; '.join(reasons)}; "
        'install one with: pip install "tap-deploy[cuda]" (cuda-python), or: pip install pycuda'
    )
