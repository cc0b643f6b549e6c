#!/usr/bin/env python3
"""Writes pasa.txt: what PASA (arXiv:2503.01873) gives on fixed inputs, computed here with NumPy's float16.

Another implementation than the kernels': arrays are real float16, and the matrix unit is a loop over chunks of
16 whose sums are float32. Needs numpy. Run in this folder after a change of the algorithm, never of a kernel.
"""
import numpy as np

TILE, CHUNK = 128, 16
H, F = np.float16, np.float32


def numbers(n, seed, mean, amplitude):
    """Uniform halves around mean: a linear congruential generator that C++ repeats exactly."""
    out, x = np.empty(n, F), seed
    for i in range(n):
        x = (1664525 * x + 1013904223) % 2**32
        out[i] = F(mean) + F(amplitude) * (F(x >> 8) / F(2**23) - F(1))
    return out.astype(H)


def product(a, b):
    """a b^T with a half-precision accumulator."""
    acc = np.zeros((len(a), len(b)), H)
    for c in range(0, a.shape[1], CHUNK):
        part = a[:, c:c + CHUNK].astype(F) @ b[:, c:c + CHUNK].astype(F).T
        acc = (acc.astype(F) + part).astype(H)
    return acc


def shift_matrix(scale):
    """M of TILE rows and beta / (1 - beta), beta being the one that the rounded M applies."""
    beta = 1 - 2.0**-4
    for _ in range(100):
        on, off = H(scale * (1 - beta / TILE)), H(-scale * beta / TILE)
        applied = -float(off) * TILE / (float(on) - float(off))
        done, beta = abs(applied - beta) < 1e-12, applied
        if done:
            break
    m = np.full((TILE, TILE), off, H)
    np.fill_diagonal(m, on)
    return m, H(beta / (1 - beta))


def pasa(q, k, v, first):
    """Row r sees keys 0 .. first + r."""
    d, n = q.shape[1], len(k)
    m, recovery = shift_matrix(float(F(1) / np.sqrt(F(d))))
    out = np.zeros((len(q), d), F)
    for r in range(len(q)):
        row, end = q[r:r + 1], min(n, first + r + 1)
        top, total, mean, acc = H(0), H(0), H(0), np.zeros(d, H)
        for j, at in enumerate(range(0, end, TILE)):
            index = np.minimum(np.arange(at, at + TILE), n - 1)  # a short tile repeats its last key
            shifted = product(m, np.ascontiguousarray(k[index].T))
            s = product(row, shifted)[0]
            seen = np.arange(at, at + TILE) < end
            here = s[seen].max()
            p = np.where(seen, np.exp((s - here).astype(F)).astype(H), H(0))
            weight, row_mean = H(p.astype(F).sum()), H(s.astype(F).mean())
            new_mean = H(F(mean) + (F(row_mean) - F(mean)) / F(j + 1))
            now_moves = H(recovery * H(row_mean - new_mean))
            then_moves = H(recovery * H(mean - new_mean)) if j else H(0)
            moved = H(here + now_moves)
            new_top = moved if j == 0 else max(H(top + then_moves), moved)
            then = H(np.exp(F(H(H(top - new_top) + then_moves)))) if j else H(0)
            now = H(np.exp(F(H(H(here - new_top) + now_moves))))
            total = H(H(then * total) + H(now * weight))
            acc = (then * acc) + (now * product(p[None], np.ascontiguousarray(v[index].T))[0])
            top, mean = new_top, new_mean
        out[r] = acc.astype(F) / F(total)
    return out


def main():
    with open('pasa.txt', 'w') as f:
        for d, n, rows, mean, amplitude in ((64, 300, 4, 0, 2), (128, 300, 4, 0, 2), (64, 256, 3, 5, 1), (128, 290, 3, 30, 0.5)):
            q, k, v = (numbers(count * d, seed, mean, amplitude).reshape(count, d)
                       for count, seed in ((rows, 1), (n, 2), (n, 3)))
            f.write(f'{d} {n} {rows} {mean} {amplitude}\n')
            for value in pasa(q, k, v, n - rows).ravel():
                f.write(f'{value:.9g}\n')


if __name__ == '__main__':
    main()
