"""include/narrows/cuda_ops.h through ctypes: the structs, and operators that take PyTorch tensors."""
import ctypes as c

OK, BAD_ARGUMENT, UNSUPPORTED, SMALL_WORKSPACE, LAUNCH_FAILED = range(5)
PAGE, BLOCK = 64, 16
p, i32, i64, f32 = c.c_void_p, c.c_int32, c.c_int64, c.c_float


class Heads(c.Structure):
    _fields_ = [('n_seq', i32), ('n_head', i32), ('n_head_kv', i32), ('head_dim', i32), ('q', p), ('out', p),
                ('q_stride', i64), ('out_stride', i64), ('scale', f32)]


class Blocks(c.Structure):
    _fields_ = [('pool', p), ('table', p), ('ld', i32), ('block', i32)]


class F16Args(c.Structure):
    _fields_ = [('heads', Heads), ('blocks', Blocks), ('n_tokens', p), ('n_max', i32), ('window', i32)]


class Kept(c.Structure):
    _fields_ = [('keys', p), ('token_of', p), ('slot_of', p), ('hand', p), ('capacity', i32), ('ld', i32)]


class Pages(c.Structure):
    _fields_ = [('pool', p), ('table', p), ('ld', i32), ('n_max', i32), ('page_bytes', i64), ('n_tokens', p), ('budget', p),
                ('max_budget', i32), ('n_sink', i32), ('rope', p), ('position', p), ('exact', Blocks), ('exact_count', p),
                ('n_exact', p)]


class SalsArgs(c.Structure):
    _fields_ = [('heads', Heads), ('pages', Pages), ('kept', Kept), ('basis', p), ('rank', i32), ('rank_score', i32),
                ('value_bits', i32), ('reserved', i32), ('codes_offset', i64), ('params_offset', i64)]


class Planes(c.Structure):
    _fields_ = [('at', i32), ('stride', i32), ('n_plane', i32), ('n_octet', i32), ('octets', i32 * 8), ('offset', i32 * 8)]


class KltPart(c.Structure):
    _fields_ = [('key_scale_at', i32), ('value_scale_at', i32), ('n_key', i32), ('n_value', i32), ('n_index', i32),
                ('reserved', i32), ('index', Planes), ('rest', Planes), ('value', Planes), ('key_decode', p), ('key_mean', p),
                ('value_decode', p), ('value_mean', p)]


class KltArgs(c.Structure):
    _fields_ = [('heads', Heads), ('pages', Pages), ('kept', Kept), ('parts', p), ('host_parts', c.POINTER(KltPart)),
                ('n_part', i32), ('mass', f32), ('turns', p)]


class Selection(c.Structure):
    _fields_ = [('selected', c.c_size_t), ('n_selected', c.c_size_t), ('n_missing', c.c_size_t)]


class Library:
    def __init__(self, path):
        self.lib = c.CDLL(path)
        self.lib.narrows_cuda_last_error.restype = c.c_char_p
        for name, args in (('f16', F16Args), ('sals', SalsArgs), ('klt', KltArgs)):
            getattr(self.lib, f'narrows_cuda_{name}_workspace').argtypes = [c.POINTER(args), c.POINTER(c.c_size_t)]
            getattr(self.lib, f'narrows_cuda_{name}_decode').argtypes = [c.POINTER(args), p, c.c_size_t, p]
            if name != 'f16':
                getattr(self.lib, f'narrows_cuda_{name}_selection').argtypes = [c.POINTER(args), c.POINTER(Selection)]

    def workspace(self, name, args):
        """(status, bytes)"""
        size = c.c_size_t()
        return getattr(self.lib, f'narrows_cuda_{name}_workspace')(c.byref(args), c.byref(size)), size.value

    def decode(self, name, args, workspace, n_bytes, stream):
        return getattr(self.lib, f'narrows_cuda_{name}_decode')(c.byref(args), workspace, n_bytes, stream)

    def selection(self, name, args):
        at = Selection()
        getattr(self.lib, f'narrows_cuda_{name}_selection')(c.byref(args), c.byref(at))
        return at

    def last_error(self):
        return self.lib.narrows_cuda_last_error().decode()


class Operator:
    """One operator with its work space: call it to launch on the current stream."""

    def __init__(self, library, name, args):
        import torch
        self.library, self.name, self.args = library, name, args
        status, self.bytes = library.workspace(name, args)
        if status != OK:
            raise RuntimeError(f'{name}: workspace gave status {status}')
        self.space = torch.zeros(self.bytes + 256, dtype=torch.uint8, device='cuda')
        self.at = (-self.space.data_ptr()) % 256

    def __call__(self):
        import torch
        status = self.library.decode(self.name, self.args, self.space.data_ptr() + self.at, self.bytes,
                                     torch.cuda.current_stream().cuda_stream)
        if status != OK:
            raise RuntimeError(f'{self.name}: status {status} ({self.library.last_error()})')

    def view(self, offset, count, dtype):
        import torch
        size = torch.empty(0, dtype=dtype).element_size()
        begin = self.at + offset
        return self.space[begin:begin + count * size].view(dtype)
