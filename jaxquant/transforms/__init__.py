"""What is done to a function: `quantized` and `explain`, the same walk with different ears."""
