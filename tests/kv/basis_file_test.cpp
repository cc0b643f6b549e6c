// Basis files: round trip, refusal of another model's file, and files that lie: cut off at every byte, every
// byte changed, wrong types, shapes and numbers. Nothing may crash, and nothing wrong may be accepted.
#include "kv/basis_file.h"

#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>

#include "ggml.h"
#include "gguf.h"
#include "kv/cache_data.h"

namespace narrows::test {
namespace {

class BasisFileTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);  // thousands of refusals are expected
  }
  void SetUp() override {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::temp_directory_path() /
              ("narrows_basis_" + std::string(info->name()) + "_" + std::to_string(::getpid()));
    std::filesystem::create_directories(folder_);
    path_ = (folder_ / "basis.gguf").string();
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  BasisFile made() const {
    BasisFile file;
    file.fingerprint = model_.fingerprint;
    file.made_from = "a test, 100 tokens";
    file.n_tokens = 100;
    for (int64_t i = 0; i < model_.n_layer; ++i) {
      const Tokens tokens(heads_, 100, static_cast<uint32_t>(i + 1));
      KeyMoments moments(heads_.width());
      moments.add(tokens.k.data(), 100);
      file.layers.push_back(moments.leading(heads_.width()).value());
      file.klt.push_back(klt_basis(tokens));
    }
    return file;
  }
  KltLayerBasis klt_basis(const Tokens& tokens) const {
    const std::vector<double> weight(static_cast<size_t>(heads_.width() * heads_.shape.head_dim), 0.0);
    CentredMoments keys(heads_.width()), values(heads_.width());
    keys.add(tokens.k.data(), heads_.width(), 100);
    values.add(tokens.v.data(), heads_.width(), 100);
    return {{make_klt_basis(keys, weight, heads_.shape.head_dim).value()},
            {make_klt_basis(values, weight, heads_.shape.head_dim).value()}};
  }
  std::string content() const {
    std::ifstream in(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void write(const std::string& bytes) const { std::ofstream(path_, std::ios::binary) << bytes; }
  Status read_status() const { return read_basis_file(path_, model_).status(); }

  /// Writes a file with ggml as `edit` wants it, and reads it.
  Status read_edited(
      const std::function<void(gguf_context*)>& edit_keys,
      const std::function<ggml_tensor*(ggml_context*, int64_t layer, bool energy)>& make_tensor = {}) const {
    ggml_context* tensors = ggml_init({.mem_size = 1 << 20, .mem_buffer = nullptr, .no_alloc = false});
    gguf_context* gguf = gguf_init_empty();
    gguf_set_val_str(gguf, "general.architecture", "narrows-basis");
    gguf_set_val_u32(gguf, "narrows-basis.version", 2);
    gguf_set_val_str(gguf, "narrows-basis.fingerprint", model_.fingerprint.c_str());
    gguf_set_val_str(gguf, "narrows-basis.made_from", "a test");
    gguf_set_val_i64(gguf, "narrows-basis.tokens", 100);
    gguf_set_val_u32(gguf, "narrows-basis.layers", static_cast<uint32_t>(model_.n_layer));
    gguf_set_val_u32(gguf, "narrows-basis.head_count_kv", static_cast<uint32_t>(model_.n_head_kv));
    gguf_set_val_u32(gguf, "narrows-basis.key_length", static_cast<uint32_t>(model_.head_dim));
    if (edit_keys) edit_keys(gguf);
    const BasisFile good = made();
    for (int64_t i = 0; i < model_.n_layer; ++i) {
      for (const bool energy : {false, true}) {
        ggml_tensor* t = make_tensor ? make_tensor(tensors, i, energy) : nullptr;
        if (!t) {
          const auto& data =
              energy ? good.layers[static_cast<size_t>(i)].energy : good.layers[static_cast<size_t>(i)].u;
          t = energy ? ggml_new_tensor_1d(tensors, GGML_TYPE_F32, heads_.width())
                     : ggml_new_tensor_2d(tensors, GGML_TYPE_F32, heads_.width(), heads_.width());
          std::memcpy(t->data, data.data(), data.size() * sizeof(float));
        }
        if (t->name[0] == '\0')
          ggml_set_name(t, ("blk." + std::to_string(i) + (energy ? ".key_energy" : ".key_basis")).c_str());
        gguf_add_tensor(gguf, t);
      }
      add_klt(gguf, tensors, i, "key", good.klt[static_cast<size_t>(i)].key.front());
      add_klt(gguf, tensors, i, "value", good.klt[static_cast<size_t>(i)].value.front());
    }
    gguf_write_to_file(gguf, path_.c_str(), false);
    gguf_free(gguf);
    ggml_free(tensors);
    return read_status();
  }

  void add_klt(gguf_context* gguf, ggml_context* tensors, int64_t layer, const std::string& of,
               const KltBasis& basis) const {
    const int64_t width = heads_.width();
    const auto add = [&](const char* what, const std::vector<float>& data, int64_t rows) {
      ggml_tensor* t = rows == 1 ? ggml_new_tensor_1d(tensors, GGML_TYPE_F32, width)
                                 : ggml_new_tensor_2d(tensors, GGML_TYPE_F32,
                                                      static_cast<int64_t>(data.size()) / width, width);
      std::memcpy(t->data, data.data(), data.size() * sizeof(float));
      const std::string name = "klt_" + of + "_" + what;
      ggml_set_name(t, ("blk." + std::to_string(layer) + "." + name).c_str());
      if (name != leave_out_) gguf_add_tensor(gguf, t);
    };
    add("mean", basis.mean, 1);
    add("weight", basis.weight, width);
    add("decode", basis.decode, width);
    add("variance", basis.variance, 1);
  }

  std::string leave_out_;  ///< klt tensor that read_edited() does not write
  Heads heads_{4, 2, 4};
  ModelInfo model_ = model_info(heads_, 2);
  std::filesystem::path folder_;
  std::string path_;
};

TEST_F(BasisFileTest, RoundTrip) {
  const BasisFile basis = made();
  const Status written = write_basis_file(path_, basis, model_);
  ASSERT_TRUE(written.ok()) << written.message();
  const auto read = read_basis_file(path_, model_);
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ((*read)->fingerprint, basis.fingerprint);
  EXPECT_EQ((*read)->made_from, basis.made_from);
  EXPECT_EQ((*read)->n_tokens, 100);
  ASSERT_EQ((*read)->layers.size(), 2U);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ((*read)->layers[i].width, 8);
    EXPECT_EQ((*read)->layers[i].rank, 8);
    EXPECT_EQ((*read)->layers[i].u, basis.layers[i].u);
    EXPECT_EQ((*read)->layers[i].energy, basis.layers[i].energy);
    const KltBasis& key = (*read)->klt[i].key.at(0);
    EXPECT_EQ(key.width, 8);
    EXPECT_EQ(key.block, heads_.shape.head_dim);
    EXPECT_EQ(key.mean, basis.klt[i].key[0].mean);
    EXPECT_EQ(key.weight, basis.klt[i].key[0].weight);
    EXPECT_EQ(key.decode, basis.klt[i].key[0].decode);
    EXPECT_EQ(key.variance, basis.klt[i].key[0].variance);
    EXPECT_EQ((*read)->klt[i].value.at(0).decode, basis.klt[i].value[0].decode);
  }
}

TEST_F(BasisFileTest, GgmlReadsWhatWasWritten) {
  ASSERT_TRUE(write_basis_file(path_, made(), model_).ok());
  ggml_context* tensors = nullptr;
  gguf_context* gguf = gguf_init_from_file(path_.c_str(), {.no_alloc = false, .ctx = &tensors});
  ASSERT_NE(gguf, nullptr);
  const ggml_tensor* t = ggml_get_tensor(tensors, "blk.1.key_basis");
  ASSERT_NE(t, nullptr);
  EXPECT_EQ(std::memcmp(t->data, made().layers[1].u.data(), 64 * sizeof(float)), 0);
  ggml_free(tensors);
  gguf_free(gguf);
}

TEST_F(BasisFileTest, EditedCopyOfAGoodFileIsGood) {  // or the refusals below would prove nothing
  const Status s = read_edited({});
  EXPECT_TRUE(s.ok()) << s.message();
}

TEST_F(BasisFileTest, RefusesAnotherModel) {
  ASSERT_TRUE(write_basis_file(path_, made(), model_).ok());
  ModelInfo other = model_;
  other.fingerprint = "fedcba9876543210";
  const Status s = read_basis_file(path_, other).status();
  EXPECT_EQ(s.code(), StatusCode::invalid_file);
  EXPECT_NE(s.message().find("0123456789abcdef"), std::string::npos) << s.message();
  EXPECT_NE(s.message().find("fedcba9876543210"), std::string::npos) << s.message();
  for (int i = 0; i < 3; ++i) {
    ModelInfo shape = model_;
    (i == 0 ? shape.n_layer : i == 1 ? shape.n_head_kv : shape.head_dim) += 1;
    EXPECT_EQ(read_basis_file(path_, shape).status().code(), StatusCode::invalid_file) << i;
  }
}

TEST_F(BasisFileTest, RefusesMissingFolderAndForeignFiles) {
  EXPECT_EQ(read_basis_file((folder_ / "none.gguf").string(), model_).status().code(),
            StatusCode::invalid_file);
  EXPECT_EQ(read_basis_file(folder_.string(), model_).status().code(), StatusCode::invalid_file);
  EXPECT_EQ(read_basis_file("/dev/null", model_).status().code(), StatusCode::invalid_file);
  for (const char* text : {"", "G", "GGU", "GGUF", "hello, this is a text and not a basis"}) {
    write(text);
    EXPECT_EQ(read_status().code(), StatusCode::invalid_file) << text;
  }
}

TEST_F(BasisFileTest, RefusesEveryCut) {
  ASSERT_TRUE(write_basis_file(path_, made(), model_).ok());
  const std::string good = content();
  for (size_t n = 0; n < good.size(); ++n) {
    write(good.substr(0, n));
    ASSERT_EQ(read_status().code(), StatusCode::invalid_file) << n << " of " << good.size();
  }
  write(good);
  EXPECT_TRUE(read_status().ok());
}

TEST_F(BasisFileTest, SurvivesEveryChangedByte) {
  ASSERT_TRUE(write_basis_file(path_, made(), model_).ok());
  const std::string good = content();
  int refused = 0;
  for (size_t i = 0; i < good.size(); ++i) {
    for (const int value : {0x00, 0x7F, 0xFF, good[i] ^ 0x40}) {
      std::string bad = good;
      bad[i] = static_cast<char>(value);
      if (bad == good) continue;
      write(bad);
      const auto read = read_basis_file(path_, model_);
      if (!read.ok()) {
        ASSERT_EQ(read.status().code(), StatusCode::invalid_file);
        ++refused;
        continue;
      }
      for (const LayerBasis& layer : (*read)->layers) {  // whatever was changed, it is usable
        for (const float x : layer.u) ASSERT_LE(std::fabs(x), 1.001F);
      }
    }
  }
  EXPECT_GT(refused, 1000);
}

TEST_F(BasisFileTest, RefusesWrongKeys) {
  const auto refused = [&](const std::function<void(gguf_context*)>& edit) {
    const Status s = read_edited(edit);
    return s.code() == StatusCode::invalid_file && s.message().find(path_) != std::string::npos;
  };
  EXPECT_TRUE(refused([](gguf_context* g) { gguf_set_val_str(g, "general.architecture", "llama"); }));
  EXPECT_TRUE(refused([](gguf_context* g) { gguf_set_val_u32(g, "general.architecture", 7); }));
  EXPECT_TRUE(refused([](gguf_context* g) { gguf_set_val_u32(g, "narrows-basis.version", 1); }));
  EXPECT_TRUE(refused([](gguf_context* g) { gguf_set_val_str(g, "narrows-basis.version", "1"); }));
  EXPECT_TRUE(refused([](gguf_context* g) { gguf_set_val_u64(g, "narrows-basis.tokens", 100); }));
  EXPECT_TRUE(refused([](gguf_context* g) { gguf_set_val_i64(g, "narrows-basis.tokens", -1); }));
  EXPECT_TRUE(refused([](gguf_context* g) { gguf_set_val_u32(g, "narrows-basis.layers", 4000000000U); }));
  EXPECT_TRUE(
      refused([](gguf_context* g) { gguf_set_val_u32(g, "narrows-basis.head_count_kv", 4000000000U); }));
  EXPECT_TRUE(refused([](gguf_context* g) { gguf_set_val_f32(g, "narrows-basis.key_length", 4.0F); }));
  EXPECT_TRUE(refused([](gguf_context* g) { gguf_set_val_bool(g, "narrows-basis.fingerprint", true); }));
  for (const char* key : {"general.architecture", "narrows-basis.version", "narrows-basis.fingerprint",
                          "narrows-basis.made_from", "narrows-basis.tokens", "narrows-basis.layers",
                          "narrows-basis.head_count_kv", "narrows-basis.key_length"}) {
    EXPECT_TRUE(refused([&](gguf_context* g) { gguf_remove_key(g, key); })) << key;
    const uint8_t bytes[] = {1, 2};
    EXPECT_TRUE(refused([&](gguf_context* g) { gguf_set_arr_data(g, key, GGUF_TYPE_UINT8, bytes, 2); }))
        << key;
  }
}

TEST_F(BasisFileTest, RefusesWrongTensors) {
  const auto refused = [&](const std::function<ggml_tensor*(ggml_context*, int64_t, bool)>& make) {
    return read_edited({}, make).code() == StatusCode::invalid_file;
  };
  const auto filled = [](ggml_tensor* t, float x) {
    for (int64_t i = 0; i < ggml_nelements(t); ++i) static_cast<float*>(t->data)[i] = x;
    return t;
  };
  // Shapes and types, of either tensor in the last layer.
  for (const bool of_energy : {false, true}) {
    const auto shaped = [&](ggml_type type, std::vector<int64_t> ne) {
      return refused([&](ggml_context* c, int64_t layer, bool energy) -> ggml_tensor* {
        if (layer != 1 || energy != of_energy) return nullptr;
        ggml_tensor* t = ggml_new_tensor(c, type, static_cast<int>(ne.size()), ne.data());
        std::memset(t->data, 0, ggml_nbytes(t));
        return t;
      });
    };
    EXPECT_TRUE(shaped(GGML_TYPE_F16, {8, 8}));
    EXPECT_TRUE(shaped(GGML_TYPE_F32, {7, 8}));
    EXPECT_TRUE(shaped(GGML_TYPE_F32, {8, 9}));
    EXPECT_TRUE(shaped(GGML_TYPE_F32, {64}));
    EXPECT_TRUE(shaped(GGML_TYPE_F32, {8, 8, 2}));
  }
  // Numbers.
  for (const float x :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 0.0F, 2.0F}) {
    EXPECT_TRUE(refused([&](ggml_context* c, int64_t layer, bool energy) -> ggml_tensor* {
      if (layer != 0 || energy) return nullptr;
      return filled(ggml_new_tensor_2d(c, GGML_TYPE_F32, 8, 8), x);
    })) << x;
  }
  EXPECT_TRUE(refused([&](ggml_context* c, int64_t layer, bool energy) -> ggml_tensor* {
    if (layer != 0 || !energy) return nullptr;
    return filled(ggml_new_tensor_1d(c, GGML_TYPE_F32, 8), std::numeric_limits<float>::quiet_NaN());
  }));
  // Names: one missing.
  EXPECT_TRUE(refused([&](ggml_context* c, int64_t layer, bool energy) -> ggml_tensor* {
    if (layer != 1 || energy) return nullptr;
    ggml_tensor* t = filled(ggml_new_tensor_2d(c, GGML_TYPE_F32, 8, 8), 0.0F);
    ggml_set_name(t, "blk.9.key_basis");
    return t;
  }));
}

TEST_F(BasisFileTest, RefusesMissingKltTensors) {
  for (const char* of : {"key", "value"}) {
    for (const char* what : {"mean", "weight", "decode", "variance"}) {
      leave_out_ = std::string("klt_") + of + "_" + what;
      const Status s = read_edited({});
      EXPECT_EQ(s.code(), StatusCode::invalid_file) << leave_out_;
      EXPECT_NE(s.message().find(leave_out_), std::string::npos) << s.message();
    }
  }
}

// Two tensors of one name, counts and dimensions beyond any file: patched into the bytes, since ggml will not
// write them.
TEST_F(BasisFileTest, RefusesPatchedHeaders) {
  ASSERT_TRUE(write_basis_file(path_, made(), model_).ok());
  const std::string good = content();
  const auto refused = [&](const std::string& bytes) {
    write(bytes);
    return read_status().code() == StatusCode::invalid_file;
  };
  std::string twin = good;
  const size_t name = twin.find("blk.1.key_basis");
  ASSERT_NE(name, std::string::npos);
  twin[name + 4] = '0';
  EXPECT_TRUE(refused(twin));

  for (const uint64_t lie :
       {uint64_t{0}, uint64_t{1} << 20, uint64_t{1} << 40, uint64_t{1} << 62, ~uint64_t{0}}) {
    for (const size_t at : {size_t{8}, size_t{16},          // tensors, keys
                            size_t{24},                     // length of the first key
                            name - 8,                       // length of a tensor's name
                            name + 15 + 4, name + 15 + 12,  // its dimensions
                            name + 15 + 24}) {              // its offset
      std::string bad = good;
      std::memcpy(bad.data() + at, &lie, sizeof(lie));
      EXPECT_TRUE(refused(bad)) << at << " " << lie;
    }
  }
}

TEST_F(BasisFileTest, WritesOnlyCompleteBases) {
  BasisFile basis = made();
  basis.layers.pop_back();
  EXPECT_EQ(write_basis_file(path_, basis, model_).code(), StatusCode::invalid_argument);
  basis = made();
  basis.layers[1].rank = 4;
  EXPECT_EQ(write_basis_file(path_, basis, model_).code(), StatusCode::invalid_argument);
  EXPECT_FALSE(std::filesystem::exists(path_));
  EXPECT_FALSE(write_basis_file((folder_ / "none" / "basis.gguf").string(), made(), model_).ok());
}

TEST_F(BasisFileTest, FailedWriteKeepsTheOldFile) {
  ASSERT_TRUE(write_basis_file(path_, made(), model_).ok());
  const std::string before = content();
  // A limit on the size of files fails a write on the way, as a full disk does.
  rlimit old = {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small = {200, old.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const Status s = write_basis_file(path_, made(), model_);
  setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(s.code(), StatusCode::io_error) << s.message();
  EXPECT_EQ(content(), before);
}

}  // namespace
}  // namespace narrows::test
