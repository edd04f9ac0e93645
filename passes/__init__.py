"""Graph to graph: one file a pass, named by its verb. Imports `compiler`.

Read `pipelines` first: it lists the passes in the order in which they run. Each other file is one
pass, a frozen dataclass whose fields are its options.
"""
