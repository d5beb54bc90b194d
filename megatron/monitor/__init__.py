"""Where a run's numbers go: console, files, dashboards. Nothing here knows how they came about."""
