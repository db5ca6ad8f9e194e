"""CLIP: checkpoints, the frozen model, its two towers as functions, and where parameters attach to them."""
