"""What carries a run: ranks, models, checkpoints, the run itself. Nothing here knows PPO."""
