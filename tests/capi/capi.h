// Handles that free themselves, for tests of the C API.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "narrows/narrows.h"
#include "support/session.h"

namespace narrows::testing {

struct CFree {
  void operator()(narrows_model* p) const { narrows_model_free(p); }
  void operator()(narrows_session* p) const { narrows_session_free(p); }
  void operator()(narrows_sampler* p) const { narrows_sampler_free(p); }
  void operator()(narrows_batch* p) const { narrows_batch_free(p); }
};
using CModel = std::unique_ptr<narrows_model, CFree>;
using CSession = std::unique_ptr<narrows_session, CFree>;
using CSampler = std::unique_ptr<narrows_sampler, CFree>;
using CBatch = std::unique_ptr<narrows_batch, CFree>;

#define EXPECT_C(expression) EXPECT_EQ(expression, NARROWS_OK) << narrows_last_error()
#define ASSERT_C(expression) ASSERT_EQ(expression, NARROWS_OK) << narrows_last_error()

/// One tiny model, as C++ and as C see it.
struct TinyC {
  LoadedTiny cpp;
  CModel c;

  TinyC() : cpp(four_layers()) {
    narrows_model* m = nullptr;
    EXPECT_C(narrows_model_load(cpp.path.c_str(), nullptr, &m));
    c.reset(m);
  }
  static TinyModel four_layers() {
    TinyModel m;
    m.n_layer = 4;
    m.n_ctx = 4096;
    return m;
  }
};

inline const TinyC& tiny() {
  static const TinyC t;
  return t;
}

/// The options that SessionSetup stands for (int8 products, float32 attention).
inline narrows_session_options c_options(const char* kv = "f16", int n_threads = 1) {
  narrows_session_options o;
  narrows_session_options_init(&o);
  o.kv = kv;
  o.n_threads = n_threads;
  o.products = "int8";
  o.attention = "f32";
  return o;
}

inline CSession c_session(const narrows_session_options& o) {
  narrows_session* s = nullptr;
  EXPECT_C(narrows_session_create(tiny().c.get(), &o, &s));
  return CSession(s);
}

inline std::vector<float> c_logits(const narrows_session* s) {
  size_t n = 0;
  const float* logits = narrows_session_logits(s, &n);
  return {logits, logits + n};
}

inline void c_prefill(narrows_session* s, std::span<const Token> tokens) {
  EXPECT_C(narrows_session_prefill(s, tokens.data(), tokens.size(), nullptr, nullptr));
}

inline std::vector<Token> c_greedy(narrows_session* s, int n) {
  std::vector<Token> tokens;
  for (int i = 0; i < n; ++i) {
    tokens.push_back(static_cast<Token>(argmax(c_logits(s))));
    EXPECT_C(narrows_session_decode(s, tokens.back()));
  }
  return tokens;
}

/// A call that is refused so, with these words in its sentence.
inline void expect_refused(narrows_status got, narrows_status want, const std::string& words) {
  EXPECT_EQ(got, want) << narrows_last_error();
  EXPECT_NE(std::string(narrows_last_error()).find(words), std::string::npos)
      << "'" << words << "' is not in: " << narrows_last_error();
}

}  // namespace narrows::testing
