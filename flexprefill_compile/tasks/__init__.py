"""Long-context tasks, and their scores after dense and sparse prefill. Law: the same seed makes the same samples.

``table.py`` lists the tasks, each a file of ``kinds/``; ``evaluation.py`` runs them, ``scoring.py`` scores a sample,
``comparison.py`` puts dense and sparse side by side, and ``summary.py`` makes the table.
"""
