"""Programs for a machine with a GPU: gpu_check tests a wheel there, soak runs random work."""
