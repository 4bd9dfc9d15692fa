"""The benchmark suite: cases, baselines, timing, report. ``python -m bench`` runs it."""
