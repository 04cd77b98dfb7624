"""The machinery around the training loop: options, run folder, checkpoints and report."""
