#!/usr/bin/env python3
"""The C API from Python, through ctypes and libnarrows.so: ctypes_test.py LIBRARY FIXTURE.

FIXTURE writes a tiny model and says what the C++ API makes of it. That this program reaches its end is a part of the
test: no error may end the process."""
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import unittest
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p, sizeof

OK, INVALID_ARGUMENT, INVALID_FILE, CONTEXT_FULL, CANCELLED, INTERNAL = 0, 1, 2, 4, 8, 10
BUFFER_TOO_SMALL = 100
Progress = ctypes.CFUNCTYPE(c_int, c_double, c_void_p)


class SessionOptions(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("kv", c_char_p), ("basis_path", c_char_p), ("products", c_char_p),
                ("attention", c_char_p), ("prefill", c_char_p), ("n_ctx", c_int64), ("n_threads", c_int32),
                ("segments", c_int32)]


class ModelInfo(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("architecture", c_char_p), ("name", c_char_p), ("fingerprint", c_char_p)] + [
        (name, c_int64) for name in ("n_layer", "n_embd", "n_ff", "n_head", "n_head_kv", "head_dim", "n_vocab",
                                     "n_ctx_train", "weight_bytes", "has_chat_template")]


class SamplerOptions(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("grammar", c_char_p), ("logit_bias", c_void_p), ("n_logit_bias", c_size_t),
                ("temperature", c_float), ("top_k", c_int32), ("top_p", c_float), ("min_p", c_float),
                ("repeat_penalty", c_float), ("presence_penalty", c_float), ("frequency_penalty", c_float),
                ("repeat_last_n", c_int32), ("seed", ctypes.c_uint32), ("reserved", ctypes.c_uint32)]


class CacheStats(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t)] + [
        (name, c_int64) for name in ("n_tokens", "bytes", "bytes_f16", "bytes_compressed_layers",
                                     "bytes_f16_compressed_layers", "bytes_pages", "bytes_f16_pages", "bytes_hot",
                                     "n_layer_compressed")]


def load_library(path):
    lib = ctypes.CDLL(path)
    tokens = POINTER(c_int32)
    signatures = {
        "last_error": (c_char_p,), "version": (c_char_p,), "status_name": (c_char_p, c_int),
        "model_load": (c_int, c_char_p, c_void_p, POINTER(c_void_p)),
        "model_free": (None, c_void_p),
        "model_get_info": (c_int, c_void_p, POINTER(ModelInfo)),
        "tokenize": (c_int, c_void_p, c_char_p, c_size_t, c_int, c_int, tokens, c_size_t, POINTER(c_size_t)),
        "detokenize": (c_int, c_void_p, tokens, c_size_t, c_int, c_char_p, c_size_t, POINTER(c_size_t)),
        "session_options_init_size": (None, POINTER(SessionOptions), c_size_t),
        "session_create": (c_int, c_void_p, POINTER(SessionOptions), POINTER(c_void_p)),
        "session_free": (None, c_void_p),
        "session_prefill": (c_int, c_void_p, tokens, c_size_t, Progress, c_void_p),
        "session_decode": (c_int, c_void_p, c_int32),
        "session_logits": (POINTER(c_float), c_void_p, POINTER(c_size_t)),
        "session_n_past": (c_int64, c_void_p),
        "session_reset": (c_int, c_void_p),
        "session_get_cache_stats": (c_int, c_void_p, POINTER(CacheStats)),
        "session_save": (c_int, c_void_p, tokens, c_size_t, c_char_p),
        "session_load": (c_int, c_void_p, POINTER(SessionOptions), c_char_p, POINTER(c_void_p)),
        "session_saved_tokens": (c_int, c_void_p, tokens, c_size_t, POINTER(c_size_t)),
        "sampler_options_init_size": (None, POINTER(SamplerOptions), c_size_t),
        "sampler_create": (c_int, c_void_p, POINTER(SamplerOptions), POINTER(c_void_p)),
        "sampler_free": (None, c_void_p),
        "sampler_sample": (c_int, c_void_p, POINTER(c_float), c_size_t, tokens),
        "batch_create": (c_int, c_void_p, c_int32, c_int32, POINTER(c_void_p)),
        "batch_free": (None, c_void_p),
        "batch_decode": (c_int, c_void_p, POINTER(c_void_p), tokens, c_size_t, POINTER(c_int)),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(lib, "narrows_" + name)
        function.restype, function.argtypes = result, arguments
    return lib


def array(tokens):
    return (c_int32 * len(tokens))(*tokens)


class Ctypes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory(prefix="narrows-ctypes-")
        cls.lib = load_library(LIBRARY)
        done = subprocess.run([FIXTURE, cls.folder.name], stdout=subprocess.PIPE, check=True)
        cls.want = json.loads(done.stdout)
        cls.model = c_void_p()
        status = cls.lib.narrows_model_load(cls.want["path"].encode(), None, byref(cls.model))
        assert status == OK, cls.lib.narrows_last_error()

    @classmethod
    def tearDownClass(cls):
        cls.lib.narrows_model_free(cls.model)
        cls.folder.cleanup()

    def ok(self, status):
        self.assertEqual(status, OK, self.lib.narrows_last_error())

    def refused(self, status, want, words):
        self.assertEqual(status, want, self.lib.narrows_last_error())
        self.assertIn(words, self.lib.narrows_last_error().decode())

    def options(self, **changes):
        o = SessionOptions()
        self.lib.narrows_session_options_init_size(byref(o), sizeof(o))
        o.products, o.attention, o.n_threads = b"int8", b"f32", 2  # as the fixture does it
        for name, value in changes.items():
            setattr(o, name, value)
        return o

    def session(self, **changes):
        s = c_void_p()
        self.ok(self.lib.narrows_session_create(self.model, byref(self.options(**changes)), byref(s)))
        self.addCleanup(self.lib.narrows_session_free, s)
        return s

    def prefill(self, session, tokens, progress=Progress()):
        return self.lib.narrows_session_prefill(session, array(tokens), len(tokens), progress, None)

    def logits(self, session):
        n = c_size_t()
        pointer = self.lib.narrows_session_logits(session, byref(n))
        self.assertEqual(n.value, self.want["n_vocab"])
        return pointer[:n.value]

    def greedy(self, session, n):
        said = []
        for _ in range(n):
            row = self.logits(session)
            said.append(row.index(max(row)))
            self.ok(self.lib.narrows_session_decode(session, said[-1]))
        return said

    def test_version_and_facts(self):
        self.assertRegex(self.lib.narrows_version().decode(), r"^\d+\.\d+\.\d+$")
        info = ModelInfo(struct_size=sizeof(ModelInfo))
        self.ok(self.lib.narrows_model_get_info(self.model, byref(info)))
        self.assertEqual((info.architecture, info.n_layer, info.n_ctx_train), (b"llama", 4, 4096))
        self.assertEqual(info.n_vocab, self.want["n_vocab"])

    def test_greedy_tokens_are_those_of_cpp(self):
        for kv in ("f16", "klt"):
            session = self.session(kv=kv.encode())
            self.ok(self.prefill(session, self.want["prompt"]))
            self.assertEqual(max(self.logits(session)), c_float(self.want[kv + "_logit"]).value)
            self.assertEqual(self.greedy(session, len(self.want[kv])), self.want[kv])
            stats = CacheStats(struct_size=sizeof(CacheStats))
            self.ok(self.lib.narrows_session_get_cache_stats(session, byref(stats)))
            self.assertEqual(stats.n_tokens, 900 + len(self.want[kv]))
            self.assertGreater(stats.bytes, 0)
            self.assertEqual(stats.n_layer_compressed, 4 if kv == "klt" else 0)

    def test_text(self):
        text = self.want["text"].encode()
        n = c_size_t()
        self.ok(self.lib.narrows_tokenize(self.model, text, len(text), 1, 0, None, 0, byref(n)))
        tokens = (c_int32 * n.value)()
        self.assertEqual(self.lib.narrows_tokenize(self.model, text, len(text), 1, 0, tokens, 1, byref(n)),
                         BUFFER_TOO_SMALL)
        self.ok(self.lib.narrows_tokenize(self.model, text, len(text), 1, 0, tokens, len(tokens), byref(n)))
        self.assertEqual(list(tokens), self.want["text_tokens"])
        back = ctypes.create_string_buffer(100)
        self.ok(self.lib.narrows_detokenize(self.model, tokens, len(tokens), 0, back, 100, byref(n)))
        self.assertEqual(back.raw[:n.value], text)

    def test_a_saved_session_goes_on(self):
        path = os.path.join(self.folder.name, "a.session").encode()
        prompt = self.want["prompt"]
        first = self.session(kv=b"klt")
        self.ok(self.prefill(first, prompt))
        self.ok(self.lib.narrows_session_save(first, array(prompt), len(prompt), path))
        second = c_void_p()
        self.ok(self.lib.narrows_session_load(self.model, byref(self.options(kv=b"f16")), path, byref(second)))
        self.addCleanup(self.lib.narrows_session_free, second)
        saved, n = (c_int32 * 1000)(), c_size_t()
        self.ok(self.lib.narrows_session_saved_tokens(second, saved, 1000, byref(n)))
        self.assertEqual(saved[:n.value], prompt)
        self.assertEqual(self.greedy(second, 24), self.want["klt"])

    def test_progress_cancels_and_its_exceptions_too(self):
        seen = []
        session = self.session()
        go_on = Progress(lambda done, user: seen.append(done) or 1)
        self.ok(self.prefill(session, self.want["prompt"], go_on))
        self.assertEqual(seen[-1], 1.0)
        self.ok(self.lib.narrows_session_reset(session))
        stop = Progress(lambda done, user: 0)
        self.refused(self.prefill(session, self.want["prompt"], stop), CANCELLED, "cancelled")
        self.refused(self.lib.narrows_session_decode(session, 1), INTERNAL, "reset")
        self.ok(self.lib.narrows_session_reset(session))
        self.ok(self.prefill(session, self.want["prompt"]))

    def test_sampler_and_batch(self):
        o, sampler = SamplerOptions(), c_void_p()
        self.lib.narrows_sampler_options_init_size(byref(o), sizeof(o))
        self.assertAlmostEqual(o.temperature, 0.7, places=6)
        o.temperature = 0
        self.ok(self.lib.narrows_sampler_create(self.model, byref(o), byref(sampler)))
        self.addCleanup(self.lib.narrows_sampler_free, sampler)
        batch = c_void_p()
        self.ok(self.lib.narrows_batch_create(self.model, 2, 2, byref(batch)))
        self.addCleanup(self.lib.narrows_batch_free, batch)
        sessions = [self.session(kv=b"f16"), self.session(kv=b"klt")]
        for s in sessions:
            self.ok(self.prefill(s, self.want["prompt"]))
        pointers, said, each = (c_void_p * 2)(*[s.value for s in sessions]), ([], []), (c_int * 2)()
        for _ in range(24):
            for s, tokens in zip(sessions, said):
                n, token = c_size_t(), c_int32()
                row = self.lib.narrows_session_logits(s, byref(n))
                self.ok(self.lib.narrows_sampler_sample(sampler, row, n, byref(token)))
                tokens.append(token.value)
            self.ok(self.lib.narrows_batch_decode(batch, pointers, array([said[0][-1], said[1][-1]]), 2, each))
            self.assertEqual(list(each), [OK, OK])
        self.assertEqual(said, (self.want["f16"], self.want["klt"]))

    def test_errors_are_statuses_with_a_sentence(self):
        out = c_void_p()
        load, create = self.lib.narrows_model_load, self.lib.narrows_session_create
        self.refused(load(b"/no/such/model.gguf", None, byref(out)), INVALID_FILE, "/no/such/model.gguf")
        self.refused(load(None, None, byref(out)), INVALID_ARGUMENT, "path is NULL")
        self.refused(load(sys.executable.encode(), None, byref(out)), INVALID_FILE, "GGUF")
        self.refused(create(self.model, byref(self.options(kv=b"klt-99")), byref(out)), INVALID_ARGUMENT, "klt-99")
        self.refused(create(self.model, byref(self.options(struct_size=8)), byref(out)), INVALID_ARGUMENT,
                     "struct_size")
        self.refused(create(self.model, byref(self.options(struct_size=0)), byref(out)), INVALID_ARGUMENT,
                     "struct_size")
        self.refused(create(None, byref(self.options()), byref(out)), INVALID_ARGUMENT, "model is NULL")
        self.assertIsNone(out.value)
        self.refused(self.lib.narrows_session_decode(None, 1), INVALID_ARGUMENT, "session is NULL")
        session = self.session(n_ctx=100)
        self.refused(self.prefill(session, self.want["prompt"]), CONTEXT_FULL, "900")
        self.refused(self.lib.narrows_session_load(self.model, None, b"/no/such.session", byref(out)), INVALID_FILE,
                     "/no/such.session")
        self.assertEqual(self.lib.narrows_session_n_past(None), -1)
        for kind in ("model", "session", "sampler", "batch"):
            getattr(self.lib, f"narrows_{kind}_free")(None)
        self.assertEqual(self.lib.narrows_status_name(CONTEXT_FULL), b"context_full")


if __name__ == "__main__":
    LIBRARY, FIXTURE = sys.argv[1:3]
    unittest.main(argv=sys.argv[:1] + sys.argv[3:])
