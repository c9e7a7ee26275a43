"""Recording: a run's own files first, MLflow second.

A run appends its metrics to a file in its own folder (`metrics_file`).  That folder is then
published to MLflow (`recorder`), whose store is made once, before any worker uses it (`store`).
"""
