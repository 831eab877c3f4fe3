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
# A LoRA merged into quantised weights: on the CPU ComfyUI rounds the sum to the format, and fp8 by
# chance up or down; under dynamic VRAM it is merged at each use and not rounded. The error of a
# weight has a deviation of step / 6**0.5 by chance, step / 12**0.5 to the nearest; guidance of 3
# triples it. e4m3: a step is an eighth. 4 bits: 1/7 of the largest, which is about 3 deviations.
MERGED_FP8 = 3 / 8 / 6**0.5
MERGED_INT4 = 3 * 3 / 7 / 12**0.5
