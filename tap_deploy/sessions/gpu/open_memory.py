"""Selection of the installed CUDA package."""

from __future__ import annotations

from tap_deploy.errors import MissingDependencyError, SessionError, first_line
from tap_deploy.sessions.gpu.memory import DeviceMemory


def open_device_memory(device_index: int = 0) -> DeviceMemory:
    """Return a ``DeviceMemory`` on cuda-python, or else on pycuda.

    Args:
        device_index: number of the GPU as CUDA counts it.

    Raises:
        MissingDependencyError: neither package is installed.
        SessionError: no such GPU, or no driver.
    """
    # Prefer cuda-python: it is maintained by NVIDIA and supports CUDA graphs.
    from tap_deploy.sessions.gpu.cuda_python import CudaPythonMemory
    from tap_deploy.sessions.gpu.pycuda import PycudaMemory

    reasons = []
    failures: list[SessionError] = []
    for kind in (CudaPythonMemory, PycudaMemory):
        try:
            return kind(device_index)
        except ImportError as exc:  # not installed, or a shared library is missing
            reasons.append(f"{kind.name}: {first_line(exc)}")
        except SessionError as exc:  # one package may need a newer driver than the other
            failures.append(exc)
    if failures:
        raise failures[0]
    raise MissingDependencyError(
        f"running on a GPU needs cuda-python or pycuda; cannot load {'; '.join(reasons)}; "
        'install one with: pip install "tap-deploy[cuda]" (cuda-python), or: pip install pycuda'
    )
