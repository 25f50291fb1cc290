"""Registers with torch, for each op: fake kernel, gradient, batching, flops and sharding rule."""
