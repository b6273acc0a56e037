"""Product code with one mistake at a time, and the tests that must see each: `make mutants`."""
