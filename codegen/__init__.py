"""From the final graph to the static plan. Imports `compiler` and `runtime`.

Read `lower` first (graph to `Program`: one entry a bucket), then `memory` (lifetimes, donation,
places in the arena).
"""
