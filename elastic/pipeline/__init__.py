"""Pipelines: a model's layers dealt to stages, the actions by which workers run them, and what moves when they change."""
