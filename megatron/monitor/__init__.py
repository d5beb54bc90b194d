"""The destinations of a run's numbers: console, files, dashboards. Nothing here computes the numbers."""
