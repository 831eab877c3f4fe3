"""Many ComfyUI processes behind one address (Ray Serve). Ray itself is imported by `app` and
`serving` alone; the rest is plain Python, so that a client needs no Ray.
"""
