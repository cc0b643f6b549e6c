// Model::load: what it tells of a good file, and whole files with one thing wrong: tensors missing,
// misshapen, unknown or of other types, vocabularies that libllama refuses, models larger than the machine.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>

#include "narrows/engine.h"
#include "support/refusal.h"
#include "support/tiny_cases.h"
#include "temp_dir.h"

namespace narrows::testing {
namespace {

Status load(const TinyModel& m) {
  const TempDir dir;
  return status_of(Model::load(m.write(dir.path("m.gguf"))));
}

void refused(const TinyModel& m, const std::vector<std::string>& words,
             StatusCode code = StatusCode::invalid_file) {
  std::vector<std::string> all = {"m.gguf"};
  all.insert(all.end(), words.begin(), words.end());
  expect_refusal(load(m), code, all);
}

TinyModel with(const std::function<void(std::vector<TinyTensor>&)>& edit) {
  TinyModel m;
  m.edit_tensors = edit;
  return m;
}

// --- good files
// ---------------------------------------------------------------------------------------------------

TEST(ModelFile, InfoIsTheFiles) {
  TinyModel m;
  m.n_layer = 3;
  m.type = GGML_TYPE_Q4_1;
  const TempDir dir;
  const std::string path = m.write(dir.path("m.gguf"));
  auto loaded = Model::load(path);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  const Model& model = **loaded;
  const ModelInfo& info = model.info();
  EXPECT_EQ(info.architecture, "llama");
  EXPECT_EQ(info.name, "tiny");
  EXPECT_EQ(info.fingerprint.size(), 16U);
  EXPECT_EQ(info.n_layer, 3);
  EXPECT_EQ(info.n_embd, 64);
  EXPECT_EQ(info.n_ff, 128);
  EXPECT_EQ(info.n_head, 4);
  EXPECT_EQ(info.n_head_kv, 2);
  EXPECT_EQ(info.head_dim, 16);
  EXPECT_EQ(info.n_vocab, kTinyVocab);
  EXPECT_EQ(info.n_ctx_train, 2048);
  int64_t bytes = 0;
  for (const TinyTensor& t : m.tensors()) {
    bytes += static_cast<int64_t>(ggml_row_size(t.type, static_cast<int64_t>(t.data.size())));
  }
  EXPECT_EQ(info.weight_bytes, bytes);
  EXPECT_EQ(model.path(), path);
  EXPECT_EQ(model.tokenizer().n_vocab(), kTinyVocab);
  EXPECT_EQ(*model.tokenizer().encode("he!", false, false), (std::vector<Token>{257, '!'}));
}

TEST(ModelFile, EveryKindLoads) {
  for (const TinyCase& c : all_cases()) {
    const Status s = load(c.model);
    EXPECT_TRUE(s.ok()) << c.name << ": " << s.message();
  }
}

// --- tensors
// ------------------------------------------------------------------------------------------------------

TEST(ModelFile, NamesTheTensorThatIsMissing) {
  for (const std::string arch : {"llama", "qwen2", "qwen3"}) {
    TinyModel m;
    m.architecture = arch;
    if (arch == "qwen3") m.head_dim = 32;
    for (const TinyTensor& t : m.tensors()) {
      TinyModel without = m;
      without.edit_tensors = [&](std::vector<TinyTensor>& all) {
        std::erase_if(all, [&](const TinyTensor& x) { return x.name == t.name; });
      };
      // Without output.weight the embedding serves for both; biases are as the file says.
      if (t.name == "output.weight" || t.name.find(".bias") != std::string::npos) {
        EXPECT_TRUE(load(without).ok()) << t.name;
      } else {
        refused(without, {t.name, "missing"});
      }
    }
  }
  // The file ends a layer early or late.
  TinyModel m;
  m.edit_metadata = [](gguf_context* g) { gguf_set_val_u32(g, "llama.block_count", 3); };
  refused(m, {"blk.2.attn_norm.weight", "missing"});
  m.edit_metadata = [](gguf_context* g) { gguf_set_val_u32(g, "llama.block_count", 4096); };
  refused(m, {"blk.2.", "missing"});
  m.edit_metadata = [](gguf_context* g) { gguf_set_val_u32(g, "llama.block_count", 1); };
  refused(m, {"blk.1."}, StatusCode::unsupported);
}

TEST(ModelFile, SaysWhichShapeIsWrongAndWhatItShouldBe) {
  TinyModel m;
  m.architecture = "qwen2";
  m.output_bias = true;
  for (const TinyTensor& t : m.tensors()) {
    const auto reshaped = [&](std::vector<int64_t> ne) {
      TinyModel changed = m;
      changed.edit_tensors = [&t, ne](std::vector<TinyTensor>& all) {
        TinyTensor& x = tensor(all, t.name);
        x.ne = ne;
        int64_t n = 1;
        for (const int64_t d : ne) n *= d;
        x.data.assign(static_cast<size_t>(n), 0.5F);
      };
      const std::string found = "[" + std::to_string(ne[0]);
      refused(changed, {t.name, found, "should be [" + std::to_string(t.ne[0])});
    };
    std::vector<int64_t> wider = t.ne, higher = t.ne;
    wider[0] += 2;
    reshaped(wider);
    higher.back() -= 1;
    reshaped(higher);
    if (t.ne.size() == 2) {
      reshaped({t.ne[0], t.ne[1], 2});
      if (t.ne[0] != t.ne[1]) reshaped({t.ne[1], t.ne[0]});
    } else {
      reshaped({t.ne[0], 2});
    }
  }
}

TEST(ModelFile, RefusesTensorsWithoutNumbers) {
  for (const TinyTensor& t : TinyModel().tensors()) {
    refused(with([&](std::vector<TinyTensor>& all) {
              TinyTensor& x = tensor(all, t.name);
              x.ne.back() = 0;
              x.data.clear();
            }),
            {});
  }
}

TEST(ModelFile, RefusesTensorsThatItWouldNotUse) {
  const auto added = [](const std::string& name, int64_t n) {
    return with([=](std::vector<TinyTensor>& all) {
      all.push_back({name, GGML_TYPE_F32, {n}, std::vector<float>(static_cast<size_t>(n), 1.0F)});
    });
  };
  for (const std::string name : {"blk.0.attn_qkv.weight", "blk.0.attn_q_norm.weight", "blk.7.attn_q.weight",
                                 "blk.00.attn_q.weight", "x"}) {
    refused(added(name, 16), {name, "llama"}, StatusCode::unsupported);
  }
  refused(added("a\nb\x1b", 16), {"llama"}, StatusCode::unsupported);  // one line all the same
  refused(added("", 16), {"llama"}, StatusCode::unsupported);
}

// Experts of which a tensor is missing, or of another shape than the metadata says: one matrix too few, two
// dimensions, a router of other experts.
TEST(ModelFile, SaysWhatIsWrongWithExperts) {
  TinyModel m;
  m.architecture = "qwen3moe";
  m.n_ff = 48;
  m.n_expert = 4;
  m.n_used = 2;
  for (const std::string part : {"gate_inp", "gate_exps", "up_exps", "down_exps"}) {
    const std::string name = "blk.1.ffn_" + part + ".weight";
    m.edit_tensors = [&](std::vector<TinyTensor>& all) {
      std::erase_if(all, [&](const TinyTensor& t) { return t.name == name; });
    };
    refused(m, {name, "missing"});
    std::vector<int64_t> right;
    const auto reshaped = [&](const std::function<void(std::vector<int64_t>&)>& change) {
      m.edit_tensors = [&](std::vector<TinyTensor>& all) {
        TinyTensor& t = tensor(all, name);
        right = t.ne;
        change(t.ne);
        int64_t n = 1;
        for (const int64_t d : t.ne) n *= d;
        t.data.assign(static_cast<size_t>(n), 0.5F);
      };
      const Status s = load(m);
      const std::string shape = right.size() == 3 ? std::to_string(right[1]) + ", 4]" : "4]";
      expect_refusal(s, StatusCode::invalid_file,
                     {"m.gguf", name, "should be [" + std::to_string(right[0]), shape});
    };
    reshaped([](std::vector<int64_t>& ne) { ne.back() = 3; });
    reshaped([](std::vector<int64_t>& ne) { ne[0] += 32; });
    reshaped([](std::vector<int64_t>& ne) { ne = {ne[0], ne[1] * 4}; });
    reshaped([](std::vector<int64_t>& ne) { ne = {ne[0], ne[1], 4, 2}; });
  }
  // A dense model's tensors are no experts, and the other way round.
  TinyModel dense;
  dense.edit_metadata = [](gguf_context* g) {
    gguf_set_val_u32(g, "llama.expert_count", 8);
    gguf_set_val_u32(g, "llama.expert_used_count", 2);
  };
  refused(dense, {"blk.0.ffn_gate_inp.weight", "missing"});
  m.architecture = "llama";
  m.edit_tensors = {};
  m.edit_metadata = [](gguf_context* g) { gguf_set_val_u32(g, "llama.expert_count", 0); };
  refused(m, {"blk.0.ffn_gate.weight", "missing"});
}

TEST(ModelFile, ToldExperts) {
  TinyModel m;
  m.architecture = "qwen3moe";
  m.n_expert = 6;
  m.n_used = 2;
  const TempDir dir;
  auto loaded = Model::load(m.write(dir.path("m.gguf")));
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ((*loaded)->info().n_expert, 6);
  EXPECT_EQ((*loaded)->info().n_expert_used, 2);
  EXPECT_EQ((*loaded)->info().n_ff, 128);
}

TEST(ModelFile, RefusesTypesThatItCannotComputeWith) {
  for (const ggml_type type : {GGML_TYPE_I8, GGML_TYPE_I16, GGML_TYPE_I32, GGML_TYPE_I64, GGML_TYPE_F64}) {
    for (const std::string name :
         {"blk.0.attn_q.weight", "token_embd.weight", "output.weight", "blk.1.ffn_norm.weight"}) {
      refused(with([&](std::vector<TinyTensor>& all) { tensor(all, name).type = type; }),
              {name, ggml_type_name(type)}, StatusCode::unsupported);
    }
  }
  TinyModel factors;
  factors.rope_factors = {1, 1, 1, 1, 2, 2, 2, 2};
  factors.edit_tensors = [](std::vector<TinyTensor>& all) {
    tensor(all, "rope_freqs.weight").type = GGML_TYPE_F16;
  };
  refused(factors, {"rope_freqs.weight", "F32"});
}

TEST(ModelFile, RefusesRopeFactorsThatCannotBe) {
  for (const float bad : {0.0F, -1.0F, std::nanf(""), std::numeric_limits<float>::infinity(), 1e10F}) {
    TinyModel m;
    m.rope_factors = {1, 1, 1, 1, 2, bad, 2, 2};
    refused(m, {"rope_freqs.weight"});
  }
  TinyModel one;  // of two that belong together
  one.architecture = "phi3";
  one.short_factors = {1, 1, 1, 1, 2, 2, 2, 2};
  refused(one, {"rope_factors_short.weight", "alone"});
  for (const size_t n : {size_t{4}, size_t{16}}) {
    TinyModel m;
    m.rope_factors.assign(n, 1.0F);
    refused(m, {"rope_freqs.weight", "should be [8"});
  }
}

// --- vocabulary
// ---------------------------------------------------------------------------------------------------

TEST(ModelFile, RefusesVocabulariesThatDoNotFit) {
  TinyModel m;
  const auto words = [](int n) {
    return [n](gguf_context* g) {
      std::vector<std::string> all;
      for (int i = 0; i < n; ++i) all.push_back("w" + std::to_string(i));
      std::vector<const char*> pointers;
      for (const std::string& w : all) pointers.push_back(w.c_str());
      gguf_set_arr_str(g, "tokenizer.ggml.tokens", pointers.data(), pointers.size());
    };
  };
  m.edit_metadata = words(257);
  refused(m, {"token_embd.weight", "[64, 258]", "[64, 257]"});
  m.edit_metadata = words(100000);
  refused(m, {"token_embd.weight", "100000"});
  m.edit_metadata = [](gguf_context* g) { gguf_set_val_str(g, "tokenizer.ggml.model", "no-such-tokenizer"); };
  refused(m, {"vocabulary"});
  m.edit_metadata = [](gguf_context* g) { gguf_remove_key(g, "tokenizer.ggml.model"); };
  refused(m, {"vocabulary"});
  m.edit_metadata = [](gguf_context* g) { gguf_set_val_str(g, "tokenizer.ggml.model", "none"); };
  refused(m, {"vocabulary"});
  m.edit_metadata = [](gguf_context* g) { gguf_remove_key(g, "tokenizer.ggml.merges"); };
  refused(m, {"vocabulary"});
}

// --- size
// ---------------------------------------------------------------------------------------------------------

// A sparse file: its tensors are holes, but as long as the table says.
TEST(ModelFile, RefusesAModelLargerThanTheMachineAtOnce) {
  const int n_layer = 64;  // of 3 GB each
  gguf_context* g = gguf_init_empty();
  const TempDir dir;
  const std::string seed = TinyModel().write(dir.path("seed.gguf"));
  gguf_context* from = gguf_init_from_file(seed.c_str(), {.no_alloc = true, .ctx = nullptr});
  gguf_set_kv(g, from);
  gguf_free(from);
  gguf_set_val_u32(g, "llama.feed_forward_length", 1 << 22);
  gguf_set_val_u32(g, "llama.block_count", n_layer);
  ggml_context* shapes =
      ggml_init({.mem_size = ggml_tensor_overhead() * 1024, .mem_buffer = nullptr, .no_alloc = true});
  size_t data = 0;
  const auto add = [&](const std::string& name, int64_t n_in, int64_t n_out) {
    ggml_tensor* t = n_out == 0 ? ggml_new_tensor_1d(shapes, GGML_TYPE_F32, n_in)
                                : ggml_new_tensor_2d(shapes, GGML_TYPE_F32, n_in, n_out);
    ggml_set_name(t, name.c_str());
    gguf_add_tensor(g, t);
    data += GGML_PAD(ggml_nbytes(t), 32);
  };
  add("token_embd.weight", 64, kTinyVocab);
  add("output_norm.weight", 64, 0);
  for (int i = 0; i < n_layer; ++i) {
    const std::string p = "blk." + std::to_string(i) + ".";
    add(p + "attn_norm.weight", 64, 0);
    add(p + "attn_q.weight", 64, 64);
    add(p + "attn_k.weight", 64, 32);
    add(p + "attn_v.weight", 64, 32);
    add(p + "attn_output.weight", 64, 64);
    add(p + "ffn_norm.weight", 64, 0);
    add(p + "ffn_gate.weight", 64, 1 << 22);
    add(p + "ffn_up.weight", 64, 1 << 22);
    add(p + "ffn_down.weight", 1 << 22, 64);
  }
  const std::string path = dir.path("m.gguf");
  ASSERT_TRUE(gguf_write_to_file(g, path.c_str(), true));
  const auto size = static_cast<off_t>(gguf_get_meta_size(g) + data);
  gguf_free(g);
  ggml_free(shapes);
  if (::truncate(path.c_str(), size) != 0) GTEST_SKIP() << "no sparse files here";
  const auto start = std::chrono::steady_clock::now();
  expect_refusal(status_of(Model::load(path)), StatusCode::out_of_memory,
                 {"m.gguf", "206.", "GB", "smaller model"});
  EXPECT_LT(std::chrono::steady_clock::now() - start,
            std::chrono::seconds(20));  // nothing was read or allocated
}

}  // namespace
}  // namespace narrows::testing
