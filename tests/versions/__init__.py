"""The core of the harness on the lowest and the highest versions that pyproject.toml admits."""
