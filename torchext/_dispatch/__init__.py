"""What torch's dispatcher knows of the ops: fake kernels, gradients, batching, flops, sharding."""
