"""How a graph is traced, and how NxD hands tensors in and out."""
