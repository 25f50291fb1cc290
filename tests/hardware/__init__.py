"""Programs for a machine with a GPU: gpu_check tests a wheel, soak runs random work."""
