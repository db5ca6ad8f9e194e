"""Hyperparameter search: Optuna proposes and stores trials, Ray Tune runs them in parallel."""
