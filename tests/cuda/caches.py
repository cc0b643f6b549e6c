"""Random caches on the device for tests and benches, and what an exact reader makes of them (float64).

Pages are made as the header says, of random codes: every pattern of bits is a valid code, so nothing has to be quantised. What no
token fills is NaN (0xFF)."""
import ctypes
import math

import torch

from narrows_cuda import BLOCK, PAGE, Blocks, F16Args, Heads, Kept, KltArgs, KltPart, Operator, Pages, Planes, SalsArgs

DEV = 'cuda'


def ptr(t):
    return t.data_ptr()


def ints(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEV)


def filled(n_bytes):
    return torch.full((n_bytes,), 0xFF, dtype=torch.uint8, device=DEV)


def rope_table(n, head_dim, base=10000.0):
    """[n, head_dim / 2, 2] f32"""
    f = base ** (-torch.arange(head_dim // 2, dtype=torch.float64, device=DEV) * 2 / head_dim)
    angle = torch.arange(n, dtype=torch.float64, device=DEV)[:, None] * f
    return torch.stack([angle.cos(), angle.sin()], -1).float()


def turn_table(n_page, n_sink, head_dim, base=10000.0):
    """Rotations of the pages' centres times the mean over a page, as KltTurns has them: [n_page, head_dim / 2, 2] f32"""
    f = base ** (-torch.arange(head_dim // 2, dtype=torch.float64, device=DEV) * 2 / head_dim)
    off = torch.arange(PAGE, dtype=torch.float64, device=DEV) - (PAGE - 1) / 2
    damp = (off[:, None] * f).cos().mean(0)
    angle = (n_sink + torch.arange(n_page, dtype=torch.float64, device=DEV)[:, None] * PAGE + (PAGE - 1) / 2) * f
    return (torch.stack([angle.cos(), angle.sin()], -1) * damp[:, None]).float()


def rotate(x, rope):
    """x [..., head_dim], rope [..., head_dim / 2, 2]"""
    half = x.shape[-1] // 2
    a, b, cos, sin = x[..., :half], x[..., half:], rope[..., 0].to(x.dtype), rope[..., 1].to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Shape:
    def __init__(self, n_seq, n_head, n_head_kv, head_dim):
        self.n_seq, self.n_head, self.n_head_kv, self.head_dim = n_seq, n_head, n_head_kv, head_dim
        self.group, self.width, self.scale = n_head // n_head_kv, n_head_kv * head_dim, head_dim ** -0.5

    def heads(self, q, out):
        return Heads(self.n_seq, self.n_head, self.n_head_kv, self.head_dim, ptr(q), ptr(out), q.stride(0), out.stride(0),
                     self.scale)

    def query(self, gain=1.0, pad=0):
        """[n_seq, n_head, head_dim], with a stride that is no row's if pad"""
        q = torch.randn(self.n_seq, self.n_head * self.head_dim + pad, device=DEV) * gain
        return q.half()[:, :self.n_head * self.head_dim].view(self.n_seq, self.n_head, self.head_dim)

    def output(self):
        return torch.full((self.n_seq, self.n_head, self.head_dim), float('nan'), dtype=torch.float16, device=DEV)


class ExactBlocks:
    """Blocks [n_head_kv][block][head_dim] of keys, then of values; counts[s]: tokens of each of a sequence's blocks."""

    def __init__(self, shape, counts, block, gain=1.0, spare=3):
        self.shape, self.counts, self.block = shape, counts, block
        n_block = sum(len(c) for c in counts)
        order = torch.randperm(n_block + spare)[:n_block].tolist()
        half = shape.n_head_kv * block * shape.head_dim
        self.pool = filled((n_block + spare) * 4 * half).view(torch.float16).view(n_block + spare, 2, shape.n_head_kv, block,
                                                                                  shape.head_dim)
        ld = max(1, max(len(c) for c in counts))
        self.table = torch.full((shape.n_seq, ld), 1 << 30, dtype=torch.int32)
        self.count = torch.zeros(shape.n_seq, ld, dtype=torch.uint8)
        k = 0
        for s, of_seq in enumerate(counts):
            for b, n in enumerate(of_seq):
                at = order[k]
                k += 1
                self.table[s, b] = at
                self.count[s, b] = n
                self.pool[at, 0, :, :n] = (torch.randn(shape.n_head_kv, n, shape.head_dim, device=DEV) * gain).half()
                self.pool[at, 1, :, :n] = torch.randn(shape.n_head_kv, n, shape.head_dim, device=DEV).half()
        self.host_table = self.table.tolist()
        self.table, self.count = self.table.to(DEV), self.count.to(DEV)
        self.n = ints([len(c) for c in counts])

    def struct(self):
        return Blocks(ptr(self.pool), ptr(self.table), self.table.shape[1], self.block)

    def rows(self, seq):
        """keys, values [n_head_kv, tokens, head_dim] in double, in order"""
        parts = [self.pool[self.host_table[seq][b], :, :, :n] for b, n in enumerate(self.counts[seq])]
        if not parts:
            return (torch.zeros(self.shape.n_head_kv, 0, self.shape.head_dim, device=DEV, dtype=torch.float64),) * 2
        both = torch.cat(parts, 2).double()
        return both[0], both[1]


def attend(shape, q, keys, values):
    """q [n_head, hd] rotated; keys, values [n_head_kv, n, hd] or lists of them, a KV head each; double."""
    out = []
    for h in range(shape.n_head):
        k, v = keys[h // shape.group], values[h // shape.group]
        if k.shape[0] == 0:
            out.append(torch.zeros(shape.head_dim, dtype=torch.float64, device=DEV))
            continue
        out.append(torch.softmax(k @ q[h].double() * shape.scale, 0) @ v)
    return torch.stack(out)


class F16Cache:
    def __init__(self, shape, lengths, block=64, window=0, pad=0):
        self.shape, self.lengths, self.window = shape, lengths, window
        counts = [[block] * (n // block) + ([n % block] if n % block else []) for n in lengths]
        self.blocks = ExactBlocks(shape, counts, block)
        self.n_tokens = ints(lengths)
        self.q, self.out = shape.query(pad=pad), shape.output()

    def operator(self, library, q=None):
        n_max = max(1, max(self.lengths))
        args = F16Args(self.shape.heads(self.q if q is None else q, self.out), self.blocks.struct(), ptr(self.n_tokens), n_max,
                       self.window)
        return Operator(library, 'f16', args)

    def oracle(self, seq):
        k, v = self.blocks.rows(seq)
        first = max(0, self.lengths[seq] - self.window) if self.window else 0
        n = self.lengths[seq]
        return attend(self.shape, self.q[seq], k[:, first:n], v[:, first:n])


class PagedCache:
    """What SALS and klt caches share. lengths: tokens in pages; exact: counts of exact blocks, a list a sequence."""

    def __init__(self, shape, lengths, budgets, exact, n_sink, page_bytes, room=None):
        self.shape, self.lengths, self.budgets, self.n_sink = shape, lengths, budgets, n_sink
        self.n_max = room or max(1, max(lengths))
        n_page = [-(-n // PAGE) for n in lengths]
        self.n_page, self.page_bytes = sum(n_page), page_bytes
        self.pool = filled(max(1, self.n_page) * page_bytes).view(-1, page_bytes)
        ld = -(-self.n_max // PAGE)
        order = torch.randperm(self.n_page)
        self.table = torch.full((shape.n_seq, ld), 1 << 30, dtype=torch.int32)
        at = 0
        for s, n in enumerate(n_page):
            self.table[s, :n] = order[at:at + n]
            at += n
        self.pages_of = [self.table[s, :n].long().to(DEV) for s, n in enumerate(n_page)]
        self.table = self.table.to(DEV)
        self.n_tokens, self.budget = ints(lengths), ints(budgets)
        self.max_budget = max(1, min(self.n_max, max(budgets)))
        self.rope = rope_table(self.n_max + n_sink + 4096, shape.head_dim)
        self.positions = [n_sink + n + 100 for n in lengths]
        self.position = ints(self.positions)
        self.exact = ExactBlocks(shape, exact, BLOCK)
        self.q, self.out = shape.query(), shape.output()

    def struct(self):
        return Pages(ptr(self.pool), ptr(self.table), self.table.shape[1], self.n_max, self.page_bytes, ptr(self.n_tokens),
                     ptr(self.budget), self.max_budget, self.n_sink, ptr(self.rope), ptr(self.position), self.exact.struct(),
                     ptr(self.exact.count), ptr(self.exact.n))

    def keep(self, n_list, row):
        capacity = -(-self.max_budget // 64) * 64
        self.kept_keys = filled(n_list * capacity * row * 2).view(torch.float16).view(n_list, capacity, row)
        self.token_of = torch.full((n_list, capacity), -1, dtype=torch.int32, device=DEV)
        self.slot_of = torch.full((n_list, self.n_max), -1, dtype=torch.int16, device=DEV)
        self.hand = torch.zeros(n_list, dtype=torch.int32, device=DEV)
        return Kept(ptr(self.kept_keys), ptr(self.token_of), ptr(self.slot_of), ptr(self.hand), capacity, self.n_max)

    def kept_bytes(self):
        return sum(t.numel() * t.element_size() for t in (self.kept_keys, self.token_of, self.slot_of, self.hand))

    def rotated_query(self, seq):
        return rotate(self.q[seq].double(), self.rope[self.positions[seq]])

    def read_selection(self, op, name, n_list):
        at = op.library.selection(name, op.args)
        n = op.view(at.n_selected, n_list, torch.int32).tolist()
        missing = op.view(at.n_missing, n_list, torch.int32).tolist()
        tokens = op.view(at.selected, n_list * self.max_budget, torch.int32).view(n_list, self.max_budget)
        return [tokens[i, :n[i]].long() for i in range(n_list)], missing


class SalsCache(PagedCache):
    def __init__(self, shape, lengths, budgets, exact, rank, value_bits, rank_score=None, n_sink=16, kept=True, room=None):
        self.rank, self.rank_score, self.value_bits = rank, rank_score or rank // 2, value_bits
        self.codes_at = PAGE * rank * 2
        code_bytes = PAGE * shape.width * value_bits // 8
        self.params_at = self.codes_at + code_bytes
        n_group = shape.width // 32
        super().__init__(shape, lengths, budgets, exact, n_sink, self.params_at + (PAGE * n_group * 4 if value_bits < 16 else 0),
                         room)
        self.basis = torch.linalg.qr(torch.randn(shape.width, rank, device=DEV))[0].half().contiguous()
        spread = torch.arange(1, rank + 1, device=DEV) ** -0.5 * 8
        self.latents, self.values = [], []
        for s, pages in enumerate(self.pages_of):
            n = lengths[s]
            if n == 0:
                continue
            z = (torch.randn(len(pages) * PAGE, rank, device=DEV) * spread).half()
            z[n:] = float('nan')
            self.pool[pages, :self.codes_at] = z.view(len(pages), -1).view(torch.uint8)
            if value_bits == 16:
                v = torch.randn(len(pages) * PAGE, shape.width, device=DEV).half()
                v[n:] = float('nan')
                self.pool[pages, self.codes_at:] = v.view(len(pages), -1).view(torch.uint8)
            else:
                codes = torch.randint(0, 256, (len(pages), code_bytes), dtype=torch.uint8, device=DEV)
                params = torch.randn(len(pages) * PAGE, n_group, 2, device=DEV)
                params[..., 0] = params[..., 0].abs() * 2.0 ** -value_bits
                params = params.half()
                params[n:] = float('nan')
                self.pool[pages, self.codes_at:self.params_at] = codes
                self.pool[pages, self.params_at:] = params.view(len(pages), -1).view(torch.uint8)
        self.kept = self.keep(shape.n_seq, shape.width) if kept else Kept()

    def operator(self, library, q=None):
        args = SalsArgs(self.shape.heads(self.q if q is None else q, self.out), self.struct(), self.kept, ptr(self.basis),
                        self.rank, self.rank_score, self.value_bits, 0, self.codes_at, self.params_at)
        return Operator(library, 'sals', args)

    def scores(self, seq):
        """As the paper: the query before RoPE, summed over the heads of a KV head, against the leading latent coordinates."""
        joint = self.q[seq].double().view(self.shape.n_head_kv, self.shape.group, -1).sum(1).view(-1)
        latent = joint @ self.basis[:, :self.rank_score].double()
        return self.latent_rows(seq)[:, :self.rank_score] @ latent

    def latent_rows(self, seq):
        pages = self.pool[self.pages_of[seq], :self.codes_at].contiguous().view(torch.float16)
        return pages.view(-1, self.rank)[:self.lengths[seq]].double()

    def value_rows(self, seq):
        pages, bits, width = self.pool[self.pages_of[seq]], self.value_bits, self.shape.width
        if bits == 16:
            return pages[:, self.codes_at:].contiguous().view(torch.float16).view(-1, width)[:self.lengths[seq]].double()
        codes = pages[:, self.codes_at:self.params_at].reshape(-1, width // 32, 32 * bits // 8)
        codes = torch.cat([codes >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -1).double()
        params = pages[:, self.params_at:].contiguous().view(torch.float16).view(-1, width // 32, 2).double()
        values = params[..., 1:] + params[..., :1] * codes
        return values.reshape(-1, width)[:self.lengths[seq]]

    def oracle(self, seq, selected):
        hd, kv = self.shape.head_dim, self.shape.n_head_kv
        keys = (self.latent_rows(seq)[selected] @ self.basis.double().T).view(-1, kv, hd).transpose(0, 1)
        keys = rotate(keys, self.rope[self.n_sink + selected].double())
        values = self.value_rows(seq)[selected].view(-1, kv, hd).transpose(0, 1)
        k, v = self.exact.rows(seq)
        return attend(self.shape, self.rotated_query(seq), torch.cat([k, keys], 1), torch.cat([v, values], 1))


def octet_bits(n_octet, rate, fall=1.2):
    """Whole bits of octets, falling, rate * 8 * n_octet in all: reverse water-filling of variances (c + 1) ** -fall."""
    variance = [(8 * o + 4.0) ** -fall for o in range(n_octet)]
    bits = [0] * n_octet
    for _ in range(int(rate * n_octet + 1e-9)):
        best = max((o for o in range(n_octet) if bits[o] < 8), key=lambda o: variance[o] * 4.0 ** -bits[o])
        bits[best] += 1
    bits = sorted(bits, reverse=True)
    return [b for b in bits if b > 0]


def plane_row(bits, at):
    """The Planes of octets with these bits, whose row 0 is at `at`."""
    planes = Planes(at, 0, 0, len(bits))
    n = 0
    for j in range(8):
        covered = sum(b > j for b in bits)
        if covered == 0:
            break
        planes.octets[j], planes.offset[j] = covered, n
        n += covered
        planes.n_plane += 1
    planes.stride = -(-n // 8) * 8
    return planes


def up16(n):
    return -(-n // 16) * 16


class KltCache(PagedCache):
    def __init__(self, shape, lengths, budgets, exact, key_rate=2, value_rate=3, n_index=None, n_sink=16, mass=1.0, anchors=0.02,
                 gain=1.0, room=None):
        hd = shape.head_dim
        self.hop = next(h for h in range(shape.n_head_kv, 0, -1) if shape.n_head_kv % h == 0 and (h == 1 or h * hd <= 256))
        self.n_part, self.part_width, self.mass = shape.n_head_kv // self.hop, self.hop * hd, mass
        self.key_bits = octet_bits(self.part_width // 8, key_rate)
        self.value_bits = octet_bits(self.part_width // 8, value_rate, 0.8)
        n_index = min(n_index or max(24, self.part_width // 8) // 8 * 8, 8 * len(self.key_bits))
        self.n_index = n_index
        n_key, n_value = 8 * len(self.key_bits), 8 * len(self.value_bits)
        self.n_coord = n_key
        padded = up16(n_key)
        at = 16
        self.host_parts = (KltPart * self.n_part)()
        self.tensors = []
        for part in self.host_parts:
            part.n_key, part.n_value, part.n_index = padded, n_value, n_index
            part.key_scale_at, part.value_scale_at = at, at + padded
            at = up16(at + padded + n_value)
            part.index = plane_row(self.key_bits[:n_index // 8], at)
            at = up16(at + PAGE * part.index.stride)
            part.rest = plane_row(self.key_bits[n_index // 8:], at)
            at = up16(at + PAGE * part.rest.stride)
            part.value = plane_row(self.value_bits, at)
            at = up16(at + PAGE * part.value.stride)
            width = self.part_width
            key = torch.linalg.qr(torch.randn(width, width, device=DEV))[0][:n_key].contiguous().bfloat16()
            key = torch.cat([key, torch.zeros(padded - n_key, width, device=DEV, dtype=torch.bfloat16)])
            words = key.view(torch.int16).view(padded // 2, 2, width).transpose(1, 2).contiguous()
            value = torch.linalg.qr(torch.randn(width, width, device=DEV))[0][:n_value].half().contiguous()
            means = torch.randn(2, width, device=DEV) * 0.3
            part.key_decode, part.key_mean = ptr(words), ptr(means)
            part.value_decode, part.value_mean = ptr(value), ptr(means) + 4 * width
            self.tensors.append((key, words, value, means))
        super().__init__(shape, lengths, budgets, exact, n_sink, at, room)
        self.parts = torch.tensor(list(bytes(self.host_parts)), dtype=torch.uint8, device=DEV)
        self.turns = turn_table(-(-self.n_max // PAGE), n_sink, hd)
        if self.n_page:
            self.pool.random_(0, 256)
            self.pool[:, :8] = 0
            marks = (torch.rand(self.n_page, 64, device=DEV) < anchors / 8).to(torch.int64)
            shifts = torch.arange(64, device=DEV)
            self.pool[:, :8] = (marks << shifts).sum(1).view(-1, 1).view(torch.uint8)
            for part in self.host_parts:
                for first, n, fall in ((part.key_scale_at, n_key, 1.2), (part.value_scale_at, n_value, 0.8)):
                    # Amplitude about 0.9 of the standard deviation, and some octaves of play.
                    deviation = torch.arange(1, n + 1, device=DEV, dtype=torch.float64) ** (-fall / 2) * 8 * gain
                    scale = 128 + 8 * torch.log2(deviation) + torch.randint(-4, 5, (self.n_page, n), device=DEV)
                    self.pool[:, first:first + n] = scale.clamp(0, 255).to(torch.uint8)
        self.kept = self.keep(shape.n_seq * shape.n_head_kv, hd)

    def operator(self, library, q=None):
        args = KltArgs(self.shape.heads(self.q if q is None else q, self.out), self.struct(), self.kept, ptr(self.parts),
                       self.host_parts, self.n_part, self.mass, ptr(self.turns))
        return Operator(library, 'klt', args)

    def amplitudes(self, seq, at, n):
        scale = self.pool[self.pages_of[seq], at:at + n].double()
        return torch.exp2((scale - 128) / 8).repeat_interleave(PAGE, 0)

    def unpack(self, seq, planes, bits, most=8):
        """Sums of +-2^-j over the planes: [tokens, coordinates] double"""
        pages = self.pool[self.pages_of[seq]]
        rows = pages[:, planes.at:planes.at + PAGE * planes.stride].reshape(-1, planes.stride)
        out = torch.zeros(rows.shape[0], len(bits), 8, dtype=torch.float64, device=DEV)
        shifts = torch.arange(8, device=DEV)
        for j in range(min(most, planes.n_plane)):
            n = planes.octets[j]
            byte = rows[:, planes.offset[j]:planes.offset[j] + n].to(torch.int64)
            out[:, :n] += ((byte[..., None] >> shifts & 1) * 2 - 1).double() * 2.0 ** -j
        return out.view(rows.shape[0], 8 * len(bits))

    def key_latents(self, seq, part, most=8):
        a = self.amplitudes(seq, part.key_scale_at, self.n_coord)
        first = self.unpack(seq, part.index, self.key_bits[:self.n_index // 8], most)
        rest = self.unpack(seq, part.rest, self.key_bits[self.n_index // 8:])
        return torch.cat([first, rest], 1) * a

    def free(self, seq):
        bits = self.pool[self.pages_of[seq], :8].contiguous().view(torch.int64).view(-1, 1)
        return (bits >> torch.arange(64, device=DEV) & 1).view(-1) == 0

    def pooled(self, seq):
        """Probabilities summed over the heads of a KV head, [n_head_kv, tokens]; anchors NaN. Scores as docs/klt.md."""
        shape, hd = self.shape, self.shape.head_dim
        q = self.rotated_query(seq) * shape.scale
        n = self.lengths[seq]
        half = hd // 2
        k_exact, _ = self.exact.rows(seq)
        out = []
        for kv in range(shape.n_head_kv):
            part, (decode, _, _, means) = self.host_parts[kv // self.hop], self.tensors[kv // self.hop]
            channels = slice(kv % self.hop * hd, (kv % self.hop + 1) * hd)
            z = self.key_latents(seq, part, 6)[:, :self.n_index]
            turn = self.turns[:n // PAGE].double()
            total = torch.zeros(n, dtype=torch.float64, device=DEV)
            for h in range(kv * shape.group, (kv + 1) * shape.group):
                x, y = q[h, :half], q[h, half:]
                back = torch.cat([x * turn[..., 0] + y * turn[..., 1], y * turn[..., 0] - x * turn[..., 1]], -1)
                u = back @ decode[:self.n_index, channels].double().T
                mean = back @ means[0, channels].double()
                score = (z.view(-1, PAGE, self.n_index) @ u[..., None]).squeeze(-1) + mean[:, None]
                score = score.reshape(-1)
                score[~self.free(seq)] = -math.inf
                both = torch.cat([score, k_exact[kv] @ q[h]])
                total += torch.softmax(both, 0)[:n]
            total[~self.free(seq)] = math.nan
            out.append(total)
        return torch.stack(out)

    def oracle(self, seq, selected):
        """selected: a list of tokens a KV head"""
        shape, hd = self.shape, self.shape.head_dim
        k, v = self.exact.rows(seq)
        keys, values = [], []
        for kv in range(shape.n_head_kv):
            part, (decode, _, value, means) = self.host_parts[kv // self.hop], self.tensors[kv // self.hop]
            channels, own = slice(kv % self.hop * hd, (kv % self.hop + 1) * hd), selected[kv]
            z = self.key_latents(seq, part)[own].float().bfloat16().double()  # as rebuilding rounds them
            x = z @ decode[:self.n_coord, channels].double() + means[0, channels].double()
            x = rotate(x, self.rope[self.n_sink + own].double()).half().double()
            w = (self.unpack(seq, part.value, self.value_bits) * self.amplitudes(seq, part.value_scale_at, part.n_value))[own]
            y = w @ value[:, channels].double() + means[1, channels].double()
            keys.append(torch.cat([k[kv], x]))
            values.append(torch.cat([v[kv], y]))
        return attend(shape, self.rotated_query(seq), keys, values)
