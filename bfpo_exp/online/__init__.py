"""Training on the policy's own samples: rollouts, advantages, PPO."""
