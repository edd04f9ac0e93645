"""Kernels that work row by row: `norms` (with `row_norm`, the norm of one row), `reductions`,
`arithmetic` of elements, `rows` (looks up and appends whole rows; finds a token's row of a cache),
`indexed` (elements by indices) and `copy` (moves strided views).
"""
