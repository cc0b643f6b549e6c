#!/usr/bin/env python3
"""Writes a GGUF file with the shapes of a hybrid of gated DeltaNet (Qwen3.5 4B) and random weights in Q4_0: for speed and memory, not
for text. The vocabulary is that of another model.

    tools/random_hybrid.py OUT.gguf --tokenizer models/Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf [--layers 32]
"""
import argparse
import random
import struct

EMBD, FF, HEADS, KV_HEADS, HEAD_DIM, ROT = 2560, 9216, 16, 4, 256, 64
KEY_HEADS, VALUE_HEADS, STATE, CONV, PERIOD = 16, 32, 128, 4, 4
F32, Q4_0 = 0, 2
U32, I32, FLOAT, STRING, ARRAY = 4, 5, 6, 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ALIGN = 32
rng = random.Random(7)


def text(s):
    data = s.encode()
    return struct.pack('<Q', len(data)) + data


def key(name, kind, value):
    forms = {U32: '<I', FLOAT: '<f'}
    return text(name) + struct.pack('<I', kind) + (text(value) if kind == STRING else struct.pack(forms[kind], value))


def tokenizer_keys(path):
    """The tokenizer's keys as they stand in the file, and the number of its tokens."""
    keys, n_token = [], 0
    with open(path, 'rb') as f:
        def number(form):
            return struct.unpack(form, f.read(struct.calcsize(form)))[0]

        def skip(kind):
            if kind == STRING:
                f.seek(number('<Q'), 1)
            elif kind == ARRAY:
                of, n = number('<I'), number('<Q')
                if of in SIZES:
                    f.seek(n * SIZES[of], 1)
                else:
                    for _ in range(n):
                        skip(of)
            else:
                f.seek(SIZES[kind], 1)

        assert f.read(4) == b'GGUF', path
        f.seek(4 + 8, 1)
        for _ in range(number('<Q')):
            begin = f.tell()
            name = f.read(number('<Q')).decode()
            skip(number('<I'))
            end = f.tell()
            if not name.startswith('tokenizer.'):
                continue
            f.seek(begin)
            keys.append(f.read(end - begin))
            if name == 'tokenizer.ggml.tokens':
                n_token = struct.unpack_from('<Q', keys[-1], 8 + len(name) + 4 + 4)[0]
            f.seek(end)
    return keys, n_token


def tensors(n_layer, n_vocab):
    """(name, shape, type, what), fastest dimension first. what: a mean of float32 numbers, a deviation of others."""
    yield 'token_embd.weight', (EMBD, n_vocab), Q4_0, .02
    width_k, width_v = KEY_HEADS * STATE, VALUE_HEADS * STATE
    for i in range(n_layer):
        def matrix(name, n_in, n_out, deviation=.02):
            return f'blk.{i}.{name}.weight', (n_in, n_out), Q4_0, deviation

        def floats(name, *shape, mean=1.0):
            return f'blk.{i}.{name}', shape, F32, mean

        yield floats('attn_norm.weight', EMBD)
        yield floats('post_attention_norm.weight', EMBD)
        if (i + 1) % PERIOD:
            yield matrix('attn_qkv', EMBD, 2 * width_k + width_v)
            yield matrix('attn_gate', EMBD, width_v)
            yield matrix('ssm_beta', EMBD, VALUE_HEADS)
            yield matrix('ssm_alpha', EMBD, VALUE_HEADS)
            yield floats('ssm_conv1d.weight', CONV, 2 * width_k + width_v, mean=.3)
            yield floats('ssm_a', VALUE_HEADS, mean=-.1)
            yield floats('ssm_dt.bias', VALUE_HEADS, mean=-2.)
            yield floats('ssm_norm.weight', STATE)
            yield matrix('ssm_out', width_v, EMBD)
        else:
            yield matrix('attn_q', EMBD, 2 * HEADS * HEAD_DIM)
            yield matrix('attn_k', EMBD, KV_HEADS * HEAD_DIM)
            yield matrix('attn_v', EMBD, KV_HEADS * HEAD_DIM)
            yield floats('attn_q_norm.weight', HEAD_DIM)
            yield floats('attn_k_norm.weight', HEAD_DIM)
            yield matrix('attn_output', HEADS * HEAD_DIM, EMBD)
        yield matrix('ffn_gate', EMBD, FF)
        yield matrix('ffn_up', EMBD, FF)
        yield matrix('ffn_down', FF, EMBD, .01)
    yield 'output_norm.weight', (EMBD,), F32, 3.


def bytes_of(shape, kind):
    n = 1
    for d in shape:
        n *= d
    return n * 4 if kind == F32 else n // 32 * 18


def pool(deviation, n_block=65537):
    """Blocks of a scale and 32 codes from -8 to 7 that are as likely as each other. A prime: rows do not repeat in step."""
    scale = struct.pack('<e', deviation / 4.6)
    return b''.join(scale + rng.randbytes(16) for _ in range(n_block))


def write_data(out, shape, kind, what, pools):
    left = bytes_of(shape, kind)
    if kind == F32:
        out.write(b''.join(struct.pack('<f', what * rng.uniform(.7, 1.3)) for _ in range(left // 4)))
        return
    if what not in pools:
        pools[what] = pool(what)
    blocks = pools[what]
    at = 18 * rng.randrange(len(blocks) // 18)
    while left:
        part = blocks[at:at + left]
        out.write(part)
        left, at = left - len(part), 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out')
    p.add_argument('--tokenizer', required=True, metavar='MODEL')
    p.add_argument('--layers', type=int, default=32, help='a multiple of 4')
    a = p.parse_args()
    keys, n_vocab = tokenizer_keys(a.tokenizer)
    sections = text('qwen35.rope.dimension_sections') + struct.pack('<IIQ4i', ARRAY, I32, 4, 11, 11, 10, 0)
    keys += [key('general.architecture', STRING, 'qwen35'), key('general.name', STRING, 'random hybrid'), sections]
    for name, value in {'block_count': a.layers, 'context_length': 262144, 'embedding_length': EMBD, 'feed_forward_length': FF,
                        'attention.head_count': HEADS, 'attention.head_count_kv': KV_HEADS, 'attention.key_length': HEAD_DIM,
                        'attention.value_length': HEAD_DIM, 'rope.dimension_count': ROT, 'ssm.conv_kernel': CONV, 'ssm.state_size': STATE,
                        'ssm.group_count': KEY_HEADS, 'ssm.time_step_rank': VALUE_HEADS, 'ssm.inner_size': VALUE_HEADS * STATE,
                        'full_attention_interval': PERIOD}.items():
        keys.append(key('qwen35.' + name, U32, value))
    keys += [key('qwen35.attention.layer_norm_rms_epsilon', FLOAT, 1e-6), key('qwen35.rope.freq_base', FLOAT, 1e7)]
    all_tensors = list(tensors(a.layers, n_vocab))
    table, at = b'', 0
    for name, shape, kind, _ in all_tensors:
        table += text(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape, kind, at)
        at += -(-bytes_of(shape, kind) // ALIGN) * ALIGN
    with open(a.out, 'wb') as out:
        out.write(b'GGUF' + struct.pack('<IQQ', 3, len(all_tensors), len(keys)) + b''.join(keys) + table)
        pools = {}
        for _, shape, kind, what in all_tensors:
            out.write(bytes(-out.tell() % ALIGN))
            write_data(out, shape, kind, what, pools)


if __name__ == '__main__':
    main()
