"""Evaluation: tasks ask, the policy answers or chooses, judges say how good that is."""
