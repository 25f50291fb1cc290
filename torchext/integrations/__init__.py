"""Adapters for other libraries. Each is imported when it is asked for, and so is its library."""
