"""Render and store the drawn data set: `python -m demo.data OUT --pairs 4000 --first 0`.

Writes person.npy, garment.npy (uint8 [N, 192, 128, 3]) and mask.npy (uint8 [N, 192, 128]). Pair i
depends on its number alone, so a set can be made in pieces by several processes and made again
anywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from .figures import HEIGHT, WIDTH, random_garment, random_person, render_garment, render_person

HELD_OUT = 1_000_000


def pair(number: int) -> tuple:
    """Person and garment parameters of pair `number`; numbers from HELD_OUT up are never trained
    on.
    """
    rng = np.random.default_rng(number)
    return random_person(rng), random_garment(rng)


def held_out_swap(number: int) -> tuple:
    """Swap `number`: a held-out person, their own garment, and another held-out garment."""
    person, own = pair(HELD_OUT + number)
    return person, own, random_garment(np.random.default_rng(HELD_OUT + 5000 + number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shape = (args.pairs, HEIGHT, WIDTH)
    person, garment = np.empty((*shape, 3), np.uint8), np.empty((*shape, 3), np.uint8)
    mask = np.empty(shape, np.uint8)
    for i in range(args.pairs):
        who, what = pair(args.first + i)
        person[i], mask[i] = render_person(who, what)
        garment[i] = render_garment(what)
    for name, array in (("person", person), ("garment", garment), ("mask", mask)):
        np.save(args.out / f"{name}.npy", array)


if __name__ == "__main__":
    main()
