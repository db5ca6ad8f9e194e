"""A search over hyperparameters: Optuna proposes and remembers, Ray Tune runs trials side by side."""
