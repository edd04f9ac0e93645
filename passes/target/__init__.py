"""What the target wants of the final graph, after all that holds for every target.

`lay_out_weights` packed weights in the order of tensor cores.
"""
