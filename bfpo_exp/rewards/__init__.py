"""Rewards of responses: who gives them, and how two of them become one."""
