"""`python -m frugal.quantize`: this folder is installed under that name (see pyproject.toml)."""
