"""`python -m frugal.fleet`: this folder is installed under that name (see pyproject.toml)."""
