"""Comparison of a sweep's runs: tables, Pareto plots, and the paper's published rows.

MLflow's runs (`collect`) -> settings (`settings`) -> means over seeds (`table`) -> text (`render`)
and plots (`pareto`, `curves`); `report` writes all of it at a sweep's end.
"""
