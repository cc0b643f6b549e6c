#!/usr/bin/env python3
"""Every operator against float64 on the device: odd sizes, NaN tails, poisoned outputs, several steps.

    device_test.py LIBRARY [NAME ...]      exit code 0: all passed; 1: one failed; 77: no device or no PyTorch"""
import ctypes
import math
import sys
import traceback

try:
    import torch
except ImportError:
    print('no PyTorch: skipped')
    sys.exit(77)
if not torch.cuda.is_available():
    print('no CUDA device: skipped')
    sys.exit(77)

from caches import DEV, F16Cache, KltCache, SalsCache, Shape
from narrows_cuda import BAD_ARGUMENT, OK, SMALL_WORKSPACE, UNSUPPORTED, F16Args, Library

CHECKS = []
# f16 outputs of sums in float32: rounding of weights and outputs to half, 2^-11 each.
TOLERANCE = 2e-3


def check(f):
    CHECKS.append(f)
    return f


def compare(out, want, tolerance=TOLERANCE):
    out = out.double()
    if not torch.isfinite(out).all():
        raise AssertionError(f'{(~torch.isfinite(out)).sum().item()} of {out.numel()} numbers are not finite')
    error = ((out - want).norm() / want.norm().clamp_min(1e-6)).item()
    if not error <= tolerance:
        raise AssertionError(f'relative error {error:.2e} above {tolerance:.0e}')
    return error


def check_top(score, selected, count, eps):
    """The selected are `count` of the best by an oracle's scores that differ from the operator's by a relative eps."""
    if selected.numel() != count:
        raise AssertionError(f'{selected.numel()} selected, not {count}')
    if count and not (selected[1:] > selected[:-1]).all():
        raise AssertionError('not ascending')
    rest = torch.ones_like(score, dtype=torch.bool)
    rest[selected] = False
    rest &= ~score.isnan()
    if score[selected].isnan().any():
        raise AssertionError('an anchor was selected')
    if count and rest.any() and score[selected].min() < score[rest].max() - eps:
        raise AssertionError(f'{score[selected].min().item()} was taken, {score[rest].max().item()} was not')


@check
def f16(library):
    worst = 0
    for n_head, n_kv, hd in ((1, 1, 64), (8, 8, 128), (12, 4, 64), (32, 8, 128), (14, 2, 64), (9, 1, 128), (8, 4, 256)):
        for lengths in ([1], [15, 16, 17], [0, 63, 64, 65, 1], [700, 3, 2049]):
            for block, window in ((64, 0), (16, 0), (64, 100), (16, 1)):
                cache = F16Cache(Shape(len(lengths), n_head, n_kv, hd), lengths, block, window, pad=8)
                op = cache.operator(library)
                for _ in range(2):  # the second time with the work space as the first left it
                    cache.out.fill_(math.nan)
                    op()
                for s in range(len(lengths)):
                    worst = max(worst, compare(cache.out[s], cache.oracle(s)))
    return f'largest error {worst:.1e}'


@check
def f16_large_scores(library):
    """Scores of thousands: the softmax must not overflow."""
    cache = F16Cache(Shape(2, 8, 2, 128), [3000, 77])
    cache.q *= 300
    cache.operator(library)()
    return f'{max(compare(cache.out[s], cache.oracle(s), 5e-3) for s in range(2)):.1e}'


def run_sals(library, cache, steps=1):
    worst, ratio = 0, []
    op = cache.operator(library)
    for step in range(steps):
        if step:
            cache.q.copy_((cache.q.float() * 0.97 + torch.randn_like(cache.q.float()) * 0.24).half())
        cache.out.fill_(math.nan)
        op()
        selected, missing = cache.read_selection(op, 'sals', cache.shape.n_seq)
        for s in range(cache.shape.n_seq):
            n = cache.lengths[s]
            if n:
                score = cache.scores(s)
                check_top(score, selected[s], min(n, cache.budgets[s]), 1e-3 * score.abs().max().item())
            want = cache.oracle(s, selected[s])
            worst = max(worst, compare(cache.out[s], want))
            if step and n:
                ratio.append(missing[s] / max(1, selected[s].numel()))
    return worst, ratio


def exact_counts(n_seq, odd=True):
    plans = [[16, 16, 16, 16, 13], [5], [16], [1, 16, 3]]
    return [plans[s % 4] if odd else [16] * 6 for s in range(n_seq)]


@check
def sals(library):
    worst = 0
    for n_head, n_kv, hd, rank in ((8, 8, 128, 128), (4, 4, 64, 64), (32, 8, 128, 128), (14, 2, 64, 64), (16, 16, 128, 512)):
        for bits in (2, 4, 16):
            for kept in (False, True):
                lengths = [300, 64, 1, 1000]
                cache = SalsCache(Shape(4, n_head, n_kv, hd), lengths, [100, 64, 8, 433], exact_counts(4), rank, bits, kept=kept)
                worst = max(worst, run_sals(library, cache, 3)[0])
    return f'largest error {worst:.1e}'


@check
def sals_long(library):
    """Keys of the selection in device memory, several shares, a budget that is no tile's."""
    worst = 0
    for kept in (False, True):
        cache = SalsCache(Shape(2, 8, 2, 128), [20011, 4097], [2501, 431], exact_counts(2), 64, 2, kept=kept)
        error, ratio = run_sals(library, cache, 3)
        worst = max(worst, error)
    return f'largest error {worst:.1e}, rebuilt {sum(ratio) / len(ratio):.2f} of the selection'


@check
def sals_ties(library):
    """All latents equal: the oldest tokens are taken."""
    cache = SalsCache(Shape(1, 4, 4, 64), [777], [100], [[16]], 64, 4)
    row = cache.pool[cache.pages_of[0][0], :cache.rank * 2].clone()
    for page in cache.pages_of[0]:
        cache.pool[page, :64 * cache.rank * 2] = row.repeat(64)
    op = cache.operator(library)
    op()
    selected, _ = cache.read_selection(op, 'sals', 1)
    assert selected[0].tolist() == list(range(100)), selected[0].tolist()
    return f'{compare(cache.out[0], cache.oracle(0, selected[0])):.1e}'


def run_klt(library, cache, steps=1, drift=0.24):
    worst, ratio = 0, []
    op = cache.operator(library)
    kv, n_list = cache.shape.n_head_kv, cache.shape.n_seq * cache.shape.n_head_kv
    for step in range(steps):
        if step:
            cache.q.copy_((cache.q.float() * 0.97 + torch.randn_like(cache.q.float()) * drift).half())
        cache.out.fill_(math.nan)
        op()
        selected, missing = cache.read_selection(op, 'klt', n_list)
        for s in range(cache.shape.n_seq):
            own = selected[s * kv:(s + 1) * kv]
            if cache.lengths[s]:
                pooled = cache.pooled(s)
                for h in range(kv):
                    free = int((~pooled[h].isnan()).sum())
                    most = min(free, cache.budgets[s])
                    count = own[h].numel()
                    # Scores go through bf16 (8 bits), as on the CPU.
                    eps = 0.04 * pooled[h][own[h]].min().item() if count else 0
                    if cache.mass == 1:
                        check_top(pooled[h], own[h], most, eps)
                        continue
                    assert count <= most
                    check_top(pooled[h], own[h], count, eps)
                    left = torch.nansum(pooled[h]) - pooled[h][own[h]].sum()
                    if count < most:
                        assert left <= (1 - cache.mass) * cache.shape.group * 1.02 + 1e-4, (left, count, most)
            worst = max(worst, compare(cache.out[s], cache.oracle(s, own)))
            if step:
                ratio += [missing[s * kv + h] / max(1, own[h].numel()) for h in range(kv)]
    return worst, ratio


@check
def klt(library):
    worst = 0
    for n_head, n_kv, hd in ((4, 4, 128), (4, 2, 128), (8, 2, 128), (16, 2, 128), (3, 3, 64), (9, 3, 64), (14, 2, 64), (6, 2, 64)):
        for rates in ((2, 3), (1, 1.5), (4, 6)):
            lengths = [320, 64, 1088]
            cache = KltCache(Shape(3, n_head, n_kv, hd), lengths, [100, 64, 433], exact_counts(3), *rates)
            worst = max(worst, run_klt(library, cache, 3)[0])
    return f'largest error {worst:.1e}'


@check
def klt_mass(library):
    worst = 0
    for gain in (0.3, 1.0, 2.0):
        cache = KltCache(Shape(2, 8, 2, 128), [2048, 640], [432, 432], exact_counts(2), mass=0.98, gain=gain)
        worst = max(worst, run_klt(library, cache, 2)[0])
    return f'largest error {worst:.1e}'


@check
def klt_long(library):
    cache = KltCache(Shape(2, 8, 2, 128), [20032, 4096], [1669, 432], exact_counts(2))
    worst, ratio = run_klt(library, cache, 3)
    return f'largest error {worst:.1e}, rebuilt {sum(ratio) / len(ratio):.2f} of the selection'


@check
def klt_few(library):
    """No pages, fewer tokens than the budget, nothing exact."""
    cache = KltCache(Shape(4, 4, 2, 64), [0, 64, 128, 256], [64, 200, 200, 7], [[16, 3], [], [1], []], room=300)
    return f'{run_klt(library, cache, 2)[0]:.1e}'


@check
def klt_ties(library):
    """All keys and their rotations equal: the oldest tokens are taken, be they few or more than are compared directly."""
    for length, budget in ((640, 100), (8192, 433)):
        for mass in (1.0, 0.9):
            cache = KltCache(Shape(1, 4, 2, 128), [length], [budget], [[16]], anchors=0, mass=mass)
            page = cache.pool[0].clone()
            for part in cache.host_parts:
                for planes in (part.index, part.rest):
                    row = page[planes.at:planes.at + planes.stride].clone()
                    page[planes.at:planes.at + 64 * planes.stride] = row.repeat(64)
            cache.pool[:] = page
            cache.turns[:] = cache.turns[0].clone()
            op = cache.operator(library)
            for _ in range(2):
                op()
                selected, _ = cache.read_selection(op, 'klt', 2)
                for own in selected:
                    assert own.tolist() == list(range(budget)), (length, mass, own.tolist()[:8], own.numel())
    return 'the oldest'


@check
def kept_keys_change_nothing(library):
    """The same query on a fresh cache and on one with a history gives the same bits."""
    torch.manual_seed(5)
    cache = KltCache(Shape(2, 8, 4, 128), [1024, 2048], [200, 333], exact_counts(2))
    op = cache.operator(library)
    want = []
    queries = [cache.shape.query() for _ in range(4)]
    for q in queries:
        cache.q.copy_(q)
        cache.token_of.fill_(-1), cache.slot_of.fill_(-1), cache.hand.zero_(), cache.kept_keys.fill_(math.nan)
        op()
        want.append(cache.out.clone())
    for _ in range(2):
        for q, out in zip(queries, want):
            cache.q.copy_(q)
            cache.out.fill_(math.nan)
            op()
            assert torch.equal(cache.out, out)
    return 'bits equal'


@check
def graphs(library):
    """Captured once, replayed as the context grows: lengths are read on the device."""
    cache = F16Cache(Shape(3, 8, 2, 128), [500, 90, 1])
    op = cache.operator(library)
    op()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op()
    cache.lengths[:] = [499, 64, 1]
    cache.n_tokens.copy_(torch.tensor(cache.lengths, dtype=torch.int32))
    cache.out.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return f'{max(compare(cache.out[s], cache.oracle(s)) for s in range(3)):.1e}'


@check
def refusals(library):
    cache = F16Cache(Shape(1, 8, 2, 128), [100])
    op = cache.operator(library)
    stream = torch.cuda.current_stream().cuda_stream
    assert library.decode('f16', op.args, op.space.data_ptr() + op.at, op.bytes - 1, stream) == SMALL_WORKSPACE
    assert library.decode('f16', op.args, op.space.data_ptr() + op.at + 1, op.bytes, stream) == BAD_ARGUMENT
    args = F16Args.from_buffer_copy(op.args)
    args.heads.head_dim = 96
    args.heads.q_stride = args.heads.out_stride = 4096
    assert library.workspace('f16', args)[0] == UNSUPPORTED
    args = F16Args.from_buffer_copy(op.args)
    args.heads.n_head_kv = 3
    assert library.workspace('f16', args)[0] == BAD_ARGUMENT
    assert library.workspace('f16', op.args)[0] == OK
    return 'as the header says'


def main():
    library = Library(sys.argv[1])
    names = sys.argv[2:]
    failed = 0
    for f in CHECKS:
        if names and f.__name__ not in names:
            continue
        torch.manual_seed(1)
        try:
            print(f'ok      {f.__name__}: {f(library)}', flush=True)
        except Exception as error:  # a summary of all, not the first
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f'FAILED  {f.__name__}: {type(error).__name__}: {str(error)[:300]} (line {where.lineno})', flush=True)
            if 'CUDA error' in str(error):
                print('the device is lost; no more tests')
                break
    print(f'{len(CHECKS) if not names else len(names)} tests, {failed} failed')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
