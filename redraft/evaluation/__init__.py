"""Evaluation: likelihood, generation, sandboxed code, reports. Extra: `redraft[eval]`; never imported by redraft."""
