"""Training programs that show GPA at work; run them with ``python -m``."""
