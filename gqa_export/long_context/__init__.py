"""What approximate attention costs a model: measured on a text, and layers chosen by it."""
