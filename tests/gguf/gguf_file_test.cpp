// GgufFile: what it reads of a good file, and files that are none, cut off or lie about themselves.
#include "gguf/gguf_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <future>
#include <limits>

#include "support/refusal.h"
#include "support/tiny_model.h"
#include "temp_dir.h"
#include "text/llama_log.h"

namespace narrows::testing {
namespace {

using namespace std::string_literals;

class GgufFileTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { silence_llama_log(); }  // ggml complains of every refusal

  Status open(const std::string& bytes) { return status_of(GgufFile::open(dir_.file("m.gguf", bytes))); }
  void refused(const std::string& bytes, const std::vector<std::string>& words = {}) {
    std::vector<std::string> all = {"m.gguf"};
    all.insert(all.end(), words.begin(), words.end());
    expect_refusal(open(bytes), StatusCode::invalid_file, all);
  }

  TempDir dir_;
};

/// Where `bytes` first stand in the file.
size_t at(const std::string& file, const std::string& bytes) {
  const size_t found = file.find(bytes);
  EXPECT_NE(found, std::string::npos);
  return found;
}

template <class T>
void put(std::string& file, size_t at, T value) {
  ASSERT_LE(at + sizeof(T), file.size());
  std::memcpy(file.data() + at, &value, sizeof(T));
}

// --- a good file
// --------------------------------------------------------------------------------------------------

TEST_F(GgufFileTest, ShowsEveryTensorAsItLies) {
  TinyModel m;
  m.type = GGML_TYPE_Q8_0;
  const std::string bytes = m.bytes();
  auto file = GgufFile::open(dir_.file("m.gguf", bytes));
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->size(), static_cast<int64_t>(bytes.size()));
  const auto tensors = m.tensors();
  ASSERT_EQ(file->tensors().size(), tensors.size());
  for (const TinyTensor& t : tensors) {
    const TensorEntry* entry = file->find(t.name);
    ASSERT_NE(entry, nullptr) << t.name;
    EXPECT_EQ(static_cast<ggml_type>(entry->type), t.type);
    EXPECT_EQ(entry->ne[0], t.ne[0]);
    EXPECT_EQ(entry->ne[1], t.ne.size() > 1 ? t.ne[1] : 1);
    EXPECT_EQ(entry->ne[2], 1);
    EXPECT_EQ(entry->bytes, entry->n_row() * entry->row_bytes());
    EXPECT_EQ(entry->row_bytes(), static_cast<int64_t>(ggml_row_size(t.type, t.ne[0])));
    std::string content(static_cast<size_t>(entry->bytes), '\0');
    ASSERT_TRUE(file->read(entry->offset, entry->bytes, content.data()).ok());
    EXPECT_EQ(content, bytes.substr(static_cast<size_t>(entry->offset), content.size()));
    if (t.type == GGML_TYPE_F32) {
      EXPECT_EQ(std::memcmp(content.data(), t.data.data(), content.size()), 0) << t.name;
    }
  }
  EXPECT_EQ(file->find("blk.9.attn_q.weight"), nullptr);
  EXPECT_EQ(describe_shape(*file->find("blk.0.ffn_up.weight")), "[64, 128] q8_0");
  EXPECT_EQ(describe_shape(*file->find("output_norm.weight")), "[64] f32");
}

TEST_F(GgufFileTest, ReadsMetadataOfEveryType) {
  TinyModel m;
  m.edit_metadata = [](gguf_context* g) {
    gguf_set_val_u8(g, "x.u8", 255);
    gguf_set_val_i8(g, "x.i8", -128);
    gguf_set_val_u16(g, "x.u16", 65535);
    gguf_set_val_i16(g, "x.i16", -3);
    gguf_set_val_u32(g, "x.u32", 4000000000U);
    gguf_set_val_i32(g, "x.i32", -4);
    gguf_set_val_u64(g, "x.u64", 1ULL << 62);
    gguf_set_val_u64(g, "x.too_large", 1ULL << 63);
    gguf_set_val_i64(g, "x.i64", std::numeric_limits<int64_t>::min());
    gguf_set_val_f32(g, "x.f32", 1.5F);
    gguf_set_val_f64(g, "x.f64", 1e300);
    gguf_set_val_bool(g, "x.bool", true);
    gguf_set_val_str(g, "x.str", "word");
  };
  auto file = GgufFile::open(m.write(dir_.path("m.gguf")));
  ASSERT_TRUE(file.ok()) << file.status().message();
  const auto whole = [&](const char* key) { return file->integer(key).value().value(); };
  EXPECT_EQ(whole("x.u8"), 255);
  EXPECT_EQ(whole("x.i8"), -128);
  EXPECT_EQ(whole("x.u16"), 65535);
  EXPECT_EQ(whole("x.i16"), -3);
  EXPECT_EQ(whole("x.u32"), 4000000000);
  EXPECT_EQ(whole("x.i32"), -4);
  EXPECT_EQ(whole("x.u64"), int64_t{1} << 62);
  EXPECT_EQ(whole("x.i64"), std::numeric_limits<int64_t>::min());
  EXPECT_EQ(file->real("x.f32").value().value(), 1.5);
  EXPECT_EQ(file->real("x.f64").value().value(), 1e300);
  EXPECT_EQ(file->text("x.str").value().value(), "word");
  EXPECT_EQ(file->array_size("tokenizer.ggml.tokens"), kTinyVocab);
  EXPECT_EQ(file->array_size("x.u8"), std::nullopt);
  EXPECT_EQ(file->array_size("x.none"), std::nullopt);
  EXPECT_FALSE(file->integer("x.none").value().has_value());
  EXPECT_FALSE(file->real("x.none").value().has_value());
  EXPECT_FALSE(file->text("x.none").value().has_value());
  // Each getter refuses what another type holds: ggml's own would abort.
  const auto bad = [&](const auto& result, const char* key) {
    expect_refusal(status_of(result), StatusCode::invalid_file, {"m.gguf", key});
  };
  for (const char* key : {"x.f32", "x.f64", "x.bool", "x.str", "tokenizer.ggml.tokens", "x.too_large"})
    bad(file->integer(key), key);
  for (const char* key : {"x.u8", "x.i64", "x.bool", "x.str", "tokenizer.ggml.tokens"})
    bad(file->real(key), key);
  for (const char* key : {"x.u8", "x.f32", "x.bool", "tokenizer.ggml.tokens"}) bad(file->text(key), key);
}

TEST_F(GgufFileTest, ReadsNothingBeyondTheEnd) {
  const std::string path = TinyModel().write(dir_.path("m.gguf"));
  auto file = GgufFile::open(path);
  ASSERT_TRUE(file.ok());
  char two[2];
  EXPECT_TRUE(file->read(file->size() - 2, 2, two).ok());
  expect_refusal(file->read(file->size() - 1, 2, two), StatusCode::io_error, {"m.gguf"});
  expect_refusal(file->read(file->size() + 100, 1, two), StatusCode::io_error, {"m.gguf"});
  EXPECT_TRUE(file->read(0, 0, nullptr).ok());
}

TEST_F(GgufFileTest, FingerprintsTellFilesApart) {
  const TinyModel m;
  const std::string bytes = m.bytes();
  const auto print = [&](const std::string& content, const char* name = "m.gguf") {
    return GgufFile::open(dir_.file(name, content)).value().fingerprint().value();
  };
  const std::string first = print(bytes);
  EXPECT_EQ(first.size(), 16U);
  EXPECT_EQ(first.find_first_not_of("0123456789abcdef"), std::string::npos);
  EXPECT_EQ(print(bytes, "elsewhere.gguf"), first);

  auto file = GgufFile::open(dir_.path("m.gguf"));
  for (const char* name :
       {"token_embd.weight", "blk.1.ffn_down.weight", "output.weight", "output_norm.weight"}) {
    const TensorEntry* t = file->find(name);
    for (const int64_t where : {t->offset, t->offset + t->bytes - 1}) {
      std::string other = bytes;
      other[static_cast<size_t>(where)] = static_cast<char>(other[static_cast<size_t>(where)] ^ 1);
      EXPECT_NE(print(other, "other.gguf"), first) << name;
    }
  }
  TinyModel renamed;
  renamed.edit_metadata = [](gguf_context* g) { gguf_set_val_str(g, "general.name", "other"); };
  EXPECT_NE(print(renamed.bytes()), first);
}

TEST_F(GgufFileTest, MayBeMoved) {
  auto opened = GgufFile::open(TinyModel().write(dir_.path("m.gguf")));
  ASSERT_TRUE(opened.ok());
  GgufFile a = std::move(*opened);
  GgufFile b = std::move(a);
  a = std::move(b);
  EXPECT_TRUE(a.fingerprint().ok());
  EXPECT_NE(a.find("output.weight"), nullptr);
}

// --- files that are none
// ------------------------------------------------------------------------------------------

TEST_F(GgufFileTest, RefusesWhatIsNoFile) {
  const auto refuse = [&](const std::string& path, const std::vector<std::string>& words) {
    expect_refusal(status_of(GgufFile::open(path)), StatusCode::invalid_file, words);
  };
  refuse(dir_.path("none.gguf"), {"none.gguf"});
  refuse(dir_.path(""), {"directory"});
  refuse("/dev/null", {"/dev/null", "regular"});
  refuse("/dev/zero", {"/dev/zero", "regular"});
  refuse("", {});
  refuse(dir_.path("a") + "/b/c.gguf", {"c.gguf"});
}

// Without care open() waits for somebody who writes.
TEST_F(GgufFileTest, RefusesAPipeWithoutWaiting) {
  const std::string path = dir_.path("pipe");
  ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
  auto opened = std::async(std::launch::async, [&] { return status_of(GgufFile::open(path)); });
  const bool in_time = opened.wait_for(std::chrono::seconds(10)) == std::future_status::ready;
  EXPECT_TRUE(in_time);
  const int writer = in_time ? -1 : ::open(path.c_str(), O_WRONLY | O_NONBLOCK);  // lets it go
  expect_refusal(opened.get(), StatusCode::invalid_file, {"pipe", "regular"});
  if (writer >= 0) ::close(writer);
}

TEST_F(GgufFileTest, RefusesWhatIsNotGguf) {
  refused("", {"empty"});
  refused("GGU", {"GGUF"});
  refused("GGUF", {"GGUF"});
  refused(std::string(23, 'G'), {"GGUF"});
  refused("This is not a model, it is a text of some length.", {"GGUF"});
  refused(std::string(100000, '\0'), {"GGUF"});
  std::string wrong = TinyModel().bytes();
  wrong[3] = 'f';
  refused(wrong, {"GGUF"});
}

// --- cut off
// ------------------------------------------------------------------------------------------------------

TEST_F(GgufFileTest, RefusesEveryCut) {
  const std::string bytes = TinyModel().bytes();
  auto whole = GgufFile::open(dir_.file("whole.gguf", bytes));
  ASSERT_TRUE(whole.ok());
  const TensorEntry& last = whole->tensors().back();
  const auto end = static_cast<size_t>(last.offset + last.bytes);
  // One file, made shorter and shorter.
  const std::string path = dir_.file("m.gguf", bytes);
  std::vector<size_t> lengths = {end - 1, end - 2, end - 31, end - 33};
  for (size_t n = 0; n <= 1024; ++n) lengths.push_back(n);
  for (size_t n = 1025; n < end; n += 331) lengths.push_back(n);
  std::sort(lengths.rbegin(), lengths.rend());
  for (const size_t n : lengths) {
    ASSERT_EQ(::truncate(path.c_str(), static_cast<off_t>(n)), 0);
    const Status s = status_of(GgufFile::open(path));
    ASSERT_EQ(static_cast<int>(s.code()), static_cast<int>(StatusCode::invalid_file))
        << n << " bytes: " << s.message();
    ASSERT_NE(s.message().find("m.gguf"), std::string::npos);
    expect_sentence(s);
  }
  EXPECT_TRUE(open(bytes.substr(0, end)).ok());  // only padding is missing
  refused(bytes.substr(0, end - 1), {"cut off", "output.weight", std::to_string(end)});
}

// --- lies
// ---------------------------------------------------------------------------------------------------------

TEST_F(GgufFileTest, RefusesOtherVersions) {
  for (const uint32_t version : {0U, 1U, 4U, 9U, 99U, 0x04000000U, 0xFFFFFFFFU}) {
    std::string bytes = TinyModel().bytes();
    put(bytes, 4, version);
    refused(bytes, {"version " + std::to_string(version), "reads 2 and 3"});
  }
  for (const uint32_t version : {0x01000000U, 0x02000000U, 0x03000000U}) {
    std::string bytes = TinyModel().bytes();
    put(bytes, 4, version);
    refused(bytes, {"big-endian", "convert"});
  }
}

// --- split models
// -------------------------------------------------------------------------------------------------

class SplitModel : public GgufFileTest {
 protected:
  void refused_parts(const std::vector<std::string>& words) {
    for (const std::string& path : paths_)
      expect_refusal(status_of(GgufFile::open(path)), StatusCode::invalid_file, words);
  }
  /// Part i again, with other metadata.
  void write_again(size_t i, const std::function<void(gguf_context*)>& edit) {
    TinyModel m;
    m.edit_metadata = [&](gguf_context* g) {
      gguf_set_val_u16(g, "split.no", static_cast<uint16_t>(i));
      gguf_set_val_u16(g, "split.count", 3);
      edit(g);
    };
    m.edit_tensors = [&](std::vector<TinyTensor>& all) { all.resize(1); };
    m.write(paths_[i]);
  }

  const TinyModel model_;
  std::vector<std::string> paths_ = write_split(model_, dir_.path("m"), 3);
};

TEST_F(SplitModel, IsOpenedByAnyPart) {
  const auto whole = GgufFile::open(model_.write(dir_.path("whole.gguf")));
  ASSERT_TRUE(whole.ok());
  std::vector<std::string> fingerprints;
  for (const std::string& path : paths_) {
    const auto split = GgufFile::open(path);
    ASSERT_TRUE(split.ok()) << split.status().message();
    EXPECT_EQ(split->path(), paths_.front());
    EXPECT_EQ(*split->text("general.name").value(), "tiny");
    ASSERT_EQ(split->tensors().size(), whole->tensors().size());
    for (const TensorEntry& t : whole->tensors()) {
      const TensorEntry* same = split->find(t.name);
      ASSERT_NE(same, nullptr);
      std::string want(static_cast<size_t>(t.bytes), '\0'), got = want, tail(4, '\0');
      ASSERT_TRUE(whole->read(t, 0, t.bytes, want.data()).ok());
      ASSERT_TRUE(split->read(*same, 0, t.bytes, got.data()).ok());
      EXPECT_EQ(got, want) << t.name;
      ASSERT_TRUE(split->read(*same, t.bytes - 4, 4, tail.data()).ok());
      EXPECT_EQ(tail, want.substr(want.size() - 4));
    }
    EXPECT_TRUE(split->unchanged_under_its_name().ok());
    fingerprints.push_back(split->fingerprint().value());
  }
  EXPECT_EQ(fingerprints[0], fingerprints[1]);
  EXPECT_EQ(fingerprints[0], fingerprints[2]);
  EXPECT_NE(fingerprints[0], whole->fingerprint().value());
}

TEST_F(SplitModel, OfOnePartOrNoneIsAnyFile) {
  TinyModel m;
  for (const uint16_t n_part : {uint16_t{0}, uint16_t{1}}) {  // as joined files have them
    m.edit_metadata = [&](gguf_context* g) { gguf_set_val_u16(g, "split.count", n_part); };
    EXPECT_TRUE(open(m.bytes()).ok());
  }
  m.edit_metadata = [](gguf_context* g) { gguf_set_val_str(g, "split.count", "three"); };
  EXPECT_TRUE(open(m.bytes()).ok());
}

TEST_F(SplitModel, NoticesThatAnyPartIsOverwritten) {
  const auto split = GgufFile::open(paths_[0]);
  ASSERT_TRUE(split.ok());
  ASSERT_TRUE(split->unchanged().ok());
  const std::string same = "x";
  ASSERT_EQ(::truncate(paths_[2].c_str(), 100), 0);
  expect_refusal(split->unchanged(), StatusCode::io_error, {"m-00003-of-00003.gguf", "overwritten"});
  const TensorEntry& last = split->tensors().back();
  std::string content(static_cast<size_t>(last.bytes), '\0');
  EXPECT_EQ(split->read(last, 0, last.bytes, content.data()).code(), StatusCode::io_error);
}

TEST_F(SplitModel, SaysWhichPartIsMissingOrWrong) {
  ASSERT_EQ(::rename(paths_[1].c_str(), dir_.path("elsewhere").c_str()), 0);
  expect_refusal(status_of(GgufFile::open(paths_[0])), StatusCode::invalid_file,
                 {"m-00002-of-00003.gguf", "cannot be opened", "part 2 of 3", "one folder"});
  ASSERT_EQ(::rename(dir_.path("elsewhere").c_str(), paths_[1].c_str()), 0);
  ASSERT_EQ(::truncate(paths_[2].c_str(), 3000), 0);
  refused_parts({"m-00003-of-00003.gguf", "cut off"});
}

TEST_F(SplitModel, RefusesPartsThatDoNotBelongTogether) {
  write_again(1, [](gguf_context* g) { gguf_set_val_u16(g, "split.count", 4); });
  expect_refusal(status_of(GgufFile::open(paths_[0])), StatusCode::invalid_file,
                 {"m-00002-of-00003.gguf", "part 2 of 4, not 2 of 3"});
  write_again(1, [](gguf_context* g) { gguf_set_val_u16(g, "split.no", 0); });
  expect_refusal(status_of(GgufFile::open(paths_[2])), StatusCode::invalid_file, {"part 1 of 3, not 2 of 3"});
  write_again(1, [](gguf_context* g) { gguf_set_val_u16(g, "split.no", 3); });
  expect_refusal(status_of(GgufFile::open(paths_[0])), StatusCode::invalid_file, {"split.no = 3"});
  // The embedding twice, in parts 1 and 2, and then one tensor too few.
  write_again(1, [](gguf_context*) {});
  refused_parts({"should have", "not of one model"});
  write_split(model_, dir_.path("m"), 3);
  TinyModel twice;
  twice.edit_metadata = [](gguf_context* g) {
    gguf_set_val_u16(g, "split.no", 1);
    gguf_set_val_u16(g, "split.count", 2);
  };
  const std::string second = twice.write(dir_.path("t-00002-of-00002.gguf"));
  twice.edit_metadata = [](gguf_context* g) { gguf_set_val_u16(g, "split.count", 2); };
  twice.write(dir_.path("t-00001-of-00002.gguf"));
  expect_refusal(status_of(GgufFile::open(second)), StatusCode::invalid_file, {"two tensors"});
}

TEST_F(SplitModel, RefusesNamesThatTellNoOthers) {
  ASSERT_EQ(::rename(paths_[1].c_str(), dir_.path("other.gguf").c_str()), 0);
  expect_refusal(status_of(GgufFile::open(dir_.path("other.gguf"))), StatusCode::invalid_file,
                 {"part 2 of 3", "-00002-of-00003.gguf", "llama-gguf-split --merge"});
  TinyModel m;
  m.edit_metadata = [](gguf_context* g) { gguf_set_val_u16(g, "split.count", 60000); };
  refused(m.bytes(), {"split.count = 60000", "512"});
  m.edit_metadata = [](gguf_context* g) {
    gguf_set_val_u16(g, "split.count", 3);
    gguf_set_val_u16(g, "split.no", 3);
  };
  refused(m.bytes(), {"split.no = 3"});
}

TEST_F(GgufFileTest, NoticesThatItIsOverwritten) {
  const std::string bytes = TinyModel().bytes(), path = dir_.file("m.gguf", bytes);
  auto file = GgufFile::open(path);
  ASSERT_TRUE(file.ok());
  EXPECT_TRUE(file->unchanged().ok());
  // Another file under the name leaves this one as it is.
  ASSERT_EQ(::rename(dir_.file("other", "other").c_str(), path.c_str()), 0);
  EXPECT_TRUE(file->unchanged().ok());
  expect_refusal(file->unchanged_under_its_name(), StatusCode::io_error, {"m.gguf", "overwritten"});

  auto in_place = GgufFile::open(dir_.file("n.gguf", bytes));
  ASSERT_TRUE(in_place.ok());
  const timespec then[2] = {{1'000'000'000, 0}, {1'000'000'000, 0}};
  ASSERT_EQ(::utimensat(AT_FDCWD, in_place->path().c_str(), then, 0), 0);
  expect_refusal(in_place->unchanged(), StatusCode::io_error, {"n.gguf", "overwritten", "start again"});

  auto shorter = GgufFile::open(dir_.file("o.gguf", bytes));
  ASSERT_TRUE(shorter.ok());
  ASSERT_EQ(::truncate(shorter->path().c_str(), 100), 0);
  expect_refusal(shorter->unchanged(), StatusCode::io_error,
                 {std::to_string(bytes.size()) + " bytes and has 100"});
}

TEST_F(GgufFileTest, RefusesCountsThatCannotBe) {
  for (const size_t field : {size_t{8}, size_t{16}}) {  // tensors, metadata
    for (const int64_t count : {int64_t{-1}, int64_t{1} << 20, (int64_t{1} << 20) + 1, int64_t{1} << 32,
                                int64_t{1} << 60, std::numeric_limits<int64_t>::max()}) {
      std::string bytes = TinyModel().bytes();
      put(bytes, field, count);
      refused(bytes);
    }
  }
}

TEST_F(GgufFileTest, RefusesLengthsThatCannotBe) {
  const std::string good = TinyModel().bytes();
  const size_t key = at(good, "general.name") - 8;                       // length of a key
  const size_t value = at(good, "general.name") + 12 + 4;                // length of its text
  const size_t tokens = at(good, "tokenizer.ggml.tokens") + 21 + 4 + 4;  // elements of the array
  const size_t name = at(good, "blk.1.attn_q.weight") - 8;               // length of a tensor's name
  for (const size_t where : {key, value, tokens, name}) {
    for (const uint64_t length :
         {uint64_t{1} << 63, ~uint64_t{0}, uint64_t{1} << 40, uint64_t{1} << 30, uint64_t{good.size()}}) {
      std::string bytes = good;
      put(bytes, where, length);
      refused(bytes);
    }
  }
  std::string empty_key = good;
  put(empty_key, key, uint64_t{0});
  refused(empty_key);
}

TEST_F(GgufFileTest, RefusesTypesThatDoNotExist) {
  const std::string good = TinyModel().bytes();
  const size_t name = at(good, "blk.1.attn_q.weight");
  for (const int32_t type : {-1, 4, 5, 99, std::numeric_limits<int32_t>::max()}) {  // 4 and 5 were once
    std::string bytes = good;
    put(bytes, name + 19 + 4 + 16, type);
    refused(bytes, {"blk.1.attn_q.weight", "type number " + std::to_string(type)});
  }
  for (const int32_t type : {-1, 13, 1000}) {
    std::string bytes = good;
    put(bytes, at(good, "general.name") + 12, type);
    refused(bytes);
  }
}

TEST_F(GgufFileTest, RefusesShapesAndOffsetsThatCannotBe) {
  const std::string good = TinyModel().bytes();
  const size_t dims = at(good, "blk.1.attn_q.weight") + 19;
  for (const uint32_t n_dims : {5U, 0xFFFFFFFFU}) {
    std::string bytes = good;
    put(bytes, dims, n_dims);
    refused(bytes);
  }
  for (const int64_t n :
       {int64_t{-1}, int64_t{1} << 40, int64_t{1} << 61, std::numeric_limits<int64_t>::max()}) {
    for (const size_t where : {dims + 4, dims + 12}) {
      std::string bytes = good;
      put(bytes, where, n);
      refused(bytes);
    }
  }
  for (const uint64_t offset :
       {uint64_t{0}, uint64_t{32}, uint64_t{1} << 40, ~uint64_t{0} - 31, uint64_t{7}}) {
    std::string bytes = good;
    put(bytes, dims + 4 + 16 + 4, offset);
    refused(bytes);
  }
}

TEST_F(GgufFileTest, RefusesANameTwice) {
  std::string bytes = TinyModel().bytes();
  bytes.replace(at(bytes, "blk.1.attn_q.weight"), 19, "blk.1.attn_k.weight");
  refused(bytes);
  std::string keys = TinyModel().bytes();
  keys.replace(at(keys, "tokenizer.ggml.tokens"), 21, "tokenizer.ggml.merges");
  refused(keys);
}

TEST_F(GgufFileTest, RefusesAlignmentsThatCannotBe) {
  for (const uint32_t alignment : {0U, 3U, 48U, 0x80000000U, 0xFFFFFFFFU}) {
    TinyModel m;
    m.edit_metadata = [](gguf_context* g) { gguf_set_val_u32(g, "general.alignment", 64); };
    std::string bytes = m.bytes();
    ASSERT_TRUE(open(bytes).ok());
    put(bytes, at(bytes, "general.alignment") + 17 + 4, alignment);
    refused(bytes);
  }
}

// What a file says must not be able to break the sentence into lines.
TEST_F(GgufFileTest, NamesWithControlCharactersStayOnOneLine) {
  std::string bytes = TinyModel().bytes();
  bytes.replace(at(bytes, "\x0d\0\0\0\0\0\0\0output.weight"s) + 8, 13, "out\nput\x1b[1m\xff ");
  refused(bytes.substr(0, bytes.size() - 64), {"cut off", "out\\x0aput\\x1b[1m"});
}

}  // namespace
}  // namespace narrows::testing
