"""Models and examples that ship with the library."""
