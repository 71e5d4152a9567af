"""What tests share. Importable because `pythonpath` names `tests` (pyproject.toml)."""
