"""Converting a model: calibration, GPTQ, size budgets, the file writer, quality."""
