"""How far a result may be from the CPU's: norm of the difference, relative.

The card's matrix products and element-wise kernels are the CPU's own. Fused attention is not: its
sums are taken in another order.
"""

from __future__ import annotations

# Models in float32.
EXACT = 1e-6
# In float16 each of the few sums that round otherwise moves by half of 2**-10, and guidance of 3
# takes the difference of two results three times.
HALF = 8 * 2.0**-10
# The same in bfloat16, without guidance.
BRAIN = 4 * 2.0**-7
# Activations, or cached pages, in 8 bits: what a rounding of float16 moved may fall into the next
# of 127 steps.
EIGHT = 8 / 127
