"""Training: plan, schedule, engine, GradCache, checkpoints and the loop."""
