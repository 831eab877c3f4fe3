"""Smoothing over time, pixel by pixel, in tiles that stay in the cache.

Frames are float32 [B, N] (N = H W). NaN counts as 0, so that one bad pixel cannot spread along the
clip. At the two ends of the clip the first and last frame repeat.
"""

from __future__ import annotations

import numpy as np

from ._jit import njit, njit_no_refcount

TILE = 4096


@njit_no_refcount
def ema(frames, keep, out, n0, n1):
    """Exponential moving average of columns n0..n1: out[t] = keep out[t - 1] + (1 - keep)
    frames[t].
    """
    share, zero = np.float32(1) - keep, np.float32(0)
    for a in range(n0, n1, TILE):
        b = min(a + TILE, n1)
        for t in range(frames.shape[0]):
            new, now = frames[t, a:b], out[t, a:b]
            before = out[max(t - 1, 0), a:b]
            if t == 0:
                for i in range(now.shape[0]):
                    now[i] = new[i] if new[i] == new[i] else zero
            else:
                for i in range(now.shape[0]):
                    value = new[i] if new[i] == new[i] else zero
                    now[i] = np.float32(keep * before[i]) + np.float32(share * value)


@njit_no_refcount
def ema_back(out, keep, n0, n1):
    """The same average back in time, in place: out[t] = keep out[t + 1] + (1 - keep) out[t]."""
    share = np.float32(1) - keep
    for a in range(n0, n1, TILE):
        b = min(a + TILE, n1)
        for back in range(2, out.shape[0] + 1):
            t = out.shape[0] - back
            now, after = out[t, a:b], out[t + 1, a:b]
            for i in range(now.shape[0]):
                now[i] = np.float32(keep * after[i]) + np.float32(share * now[i])


@njit_no_refcount
def middle(a, b, c):
    """Median of three."""
    return max(min(a, b), min(max(a, b), c))


@njit_no_refcount
def median(frames, radius, out, n0, n1):
    """Median over 2 radius + 1 frames (radius 1 or 2) of columns n0..n1."""
    last = frames.shape[0] - 1
    zero = np.float32(0)
    for a in range(n0, n1, TILE):
        b = min(a + TILE, n1)
        for t in range(frames.shape[0]):
            now = out[t, a:b]
            p, q, r = frames[max(t - 1, 0), a:b], frames[t, a:b], frames[min(t + 1, last), a:b]
            if radius == 1:
                for i in range(now.shape[0]):
                    u = p[i] if p[i] == p[i] else zero
                    v = q[i] if q[i] == q[i] else zero
                    w = r[i] if r[i] == r[i] else zero
                    now[i] = middle(u, v, w)
            else:
                o, s = frames[max(t - 2, 0), a:b], frames[min(t + 2, last), a:b]
                for i in range(now.shape[0]):
                    u = p[i] if p[i] == p[i] else zero
                    v = q[i] if q[i] == q[i] else zero
                    w = r[i] if r[i] == r[i] else zero
                    x = o[i] if o[i] == o[i] else zero
                    y = s[i] if s[i] == s[i] else zero
                    now[i] = middle(max(min(x, u), min(w, y)), v, min(max(x, u), max(w, y)))


@njit
def union(frames, out, n0, n1):
    """Maximum over the whole clip of columns n0..n1, written to every frame."""
    zero = np.float32(0)
    top = np.empty(TILE, np.float32)
    for a in range(n0, n1, TILE):
        b = min(a + TILE, n1)
        best = top[: b - a]
        for t in range(frames.shape[0]):
            new = frames[t, a:b]
            for i in range(best.shape[0]):
                value = new[i] if new[i] == new[i] else zero
                best[i] = value if t == 0 or value > best[i] else best[i]
        for t in range(frames.shape[0]):
            now = out[t, a:b]
            for i in range(best.shape[0]):
                now[i] = best[i]
