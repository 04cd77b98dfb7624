"""The pictures that the model learns: Oxford Flowers102, and synthetic flowers in its place."""
