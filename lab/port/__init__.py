"""For those who write the reference again: a kit of numbers, its checker, a port in NumPy. README.md is the guide."""
