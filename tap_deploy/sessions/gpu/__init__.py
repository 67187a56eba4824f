"""GPU execution shared by all GPU backends: device memory, lanes, captions."""
