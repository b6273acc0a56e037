"""What a run is: a YAML file and its overrides as frozen pydantic models."""
