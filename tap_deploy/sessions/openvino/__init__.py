"""The OpenVINO backend, for CPUs."""
