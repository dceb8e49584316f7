"""An OpenAI-compatible server with continuous batching; an extra, never imported by `import redraft`."""
