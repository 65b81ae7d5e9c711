"""A stand-in for the few parts of ComfyUI that the node pack touches, over the real comfy-kitchen.

It keeps what the pack builds on (names, signatures, the order of things, what is patched when) and nothing else: one CPU,
no streams, and a "model" that applies each of its linear layers to a fixed input. Its signatures are checked against a
real ComfyUI where there is one.
"""
