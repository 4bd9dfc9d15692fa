"""The benchmark suite: cases, peers, jobs, timing, report. ``python -m bench`` runs it."""
