"""HTTP in: decode, call one flow, render."""
