"""One loop for all trained stages: Ray Train starts workers, DeepSpeed runs the step, a trainee is what differs."""
