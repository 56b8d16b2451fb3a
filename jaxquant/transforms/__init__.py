"""What is done to a function: `quantized`, `explain`, `calibrate`, `quantize_sequentially`; one walk, other rules."""
